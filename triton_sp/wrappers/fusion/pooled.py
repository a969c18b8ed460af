"""Images whose features are pooled from patches at which an argument points, by their numbers in the batch (Molmo 2): a
rank with images of its own is given pointers into the patches of these."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor


def pooled_rows(arguments: Mapping[str, Any], pixels: str) -> tuple[dict[str, list[int]] | str, str]:
    """How many entries of each argument are each image's, and which argument points at patches: the one that has a row
    for each cell of all grids; nothing where none does. A sentence where images do not point at crops of their own.

    >>> import torch
    >>> pointers = torch.tensor([[0, 1], [2, 3], [4, 9], [8, -1], [12, 13]])
    >>> grids = torch.tensor([[1, 2, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    >>> pooled_rows({"pixels": torch.zeros(4, 4, 8), "pointers": pointers, "grids": grids}, "pixels")
    ({'pixels': [1, 2, 1], 'pointers': [2, 2, 1], 'grids': [1, 1, 1]}, 'pointers')
    >>> pooled_rows({"pixels": torch.zeros(4, 4, 8), "pointers": pointers.flip(0), "grids": grids}, "pixels")
    ('pointers does not point at crops of one image after another', 'pointers')
    >>> pooled_rows({"pixels": torch.zeros(4, 4, 8), "grids": grids}, "pixels")
    ({}, '')
    """
    crops, found = arguments[pixels], _pointers_and_grids(arguments)
    if crops.ndim != 3 or found is None:
        return {}, ""
    pointers, grids, cells = found
    starts = _first_crops(arguments[pointers], cells, crops.shape[1])
    own = [after - first for first, after in pairwise([*starts, len(crops)])]
    if starts[0] != 0 or min(own) <= 0:
        return f"{pointers} does not point at crops of one image after another", pointers
    return {pixels: own, pointers: cells, grids: [1] * len(cells)}, pointers


def pointed_at_own(pointers: Tensor, patches: int) -> Tensor:
    """Pointers into the patches of some neighbouring images, counted from the first crop of these; -1 stays.

    >>> import torch
    >>> pointed_at_own(torch.tensor([[4, 9], [8, -1]]), 4).tolist()
    [[0, 5], [4, -1]]
    """
    first = int(pointers[pointers >= 0].min()) // patches * patches
    return pointers.where(pointers < 0, pointers - first)


def _pointers_and_grids(arguments: Mapping[str, Any]) -> tuple[str, str, list[int]] | None:
    """Two arguments of whole numbers: a row for each cell, and one of pairs of heights and widths for each image. And
    how many cells each image has."""
    tables = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) and not value.is_floating_point()
    }
    for grids, sizes in tables.items():
        if sizes.shape[1] != 4:
            continue
        cells = sizes.unflatten(1, (2, 2)).prod(-1).sum(-1).tolist()
        pointers = next((name for name, rows in tables.items() if name != grids and len(rows) == sum(cells)), None)
        if pointers is not None:
            return pointers, grids, cells
    return None


def _first_crops(pointers: Tensor, cells: list[int], patches: int) -> list[int]:
    """The first crop that each image points at, or -1 where one does not, or points at another image's as well."""
    ends = [0, *accumulate(cells)]
    spans = []
    for start, stop in pairwise(ends):
        given = pointers[start:stop]
        given = given[given >= 0] // patches
        spans.append((int(given.min()), int(given.max())) if len(given) else (-1, -1))
    apart = all(last < first for (_, last), (first, _) in pairwise(spans))
    return [first for first, _ in spans] if apart else [-1]
