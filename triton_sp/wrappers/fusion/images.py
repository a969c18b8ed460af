"""Which part of a feature method's arguments belongs to which image, so that each rank is given its images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from triton_sp.plan.shards import shard_tokens
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.cuts import PixelShard


def take_from_samples(pixels: str, arguments: Mapping[str, Any], group: Group) -> tuple[dict[str, Any], bool]:
    """The arguments with this rank's images, or with the first image if it has none, and whether it has any. Each entry
    is a sample's images, filled up with images of zeros."""
    shape = arguments[pixels].shape[:2]
    real = arguments[pixels].flatten(0, 1).flatten(1).any(1).nonzero().flatten()
    own = shard_tokens(len(real), group.size).range(group.rank)
    index = real[own.start : own.stop] if own else torch.zeros(1, dtype=torch.long, device=real.device)
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.shape[:2] == shape}
    return {name: value.flatten(0, 1)[index][:, None] for name, value in given.items()}, bool(own)


def rows_of_images(arguments: Mapping[str, Any], pixels: str, grid: str | None) -> dict[str, list[int]] | str:
    """How many entries of each argument are each image's, told by the first dimensions; of each sample's images, where
    images are tiled by their number in the sample. A sentence if an argument does not fit.

    >>> five = torch.zeros(5, 3, 8, 8)
    >>> rows_of_images({"pixel_values": five, "image_sizes": torch.ones(5, 2)}, "pixel_values", None)
    {'pixel_values': [1, 1, 1, 1, 1], 'image_sizes': [1, 1, 1, 1, 1]}
    >>> rows_of_images({"pixel_values": five, "tiles": torch.ones(7)}, "pixel_values", None)
    'tiles has 7 entries, pixel_values 5'
    >>> grids = torch.tensor([[1, 2, 2], [1, 4, 2]])
    >>> rows_of_images({"pixel_values": torch.zeros(12, 48), "image_grid_thw": grids}, "pixel_values", "image_grid_thw")
    {'pixel_values': [4, 8], 'image_grid_thw': [1, 1]}
    >>> crops = {"pixel_values": torch.zeros(2, 3, 8, 8), "crops": torch.zeros(5, 3, 8, 8), "num": torch.tensor([2, 3])}
    >>> rows_of_images(crops, "pixel_values", None)
    {'pixel_values': [1, 1], 'crops': [2, 3], 'num': [1, 1]}
    >>> strip = {"pixel_values": torch.zeros(1, 3, 4, 48), "target_sizes": torch.tensor([[2, 2], [4, 2]])}
    >>> rows_of_images(strip, "pixel_values", None)
    {'pixel_values': [16, 32], 'target_sizes': [1, 1]}
    """
    images, told, strip = _entries_by_image(arguments, pixels, grid)
    rows: dict[str, list[int]] = {}
    for name, value in arguments.items():
        if name == "batch_num_images" or not _has_entries(value):
            continue
        entries = value.shape[-1] if strip and name == pixels else len(value)
        own = next((counts for counts in told if entries == sum(counts)), None)
        if own is None:
            return f"{name} has {len(value)} entries, {grid or pixels} {images}"
        rows[name] = own
    samples = arguments.get("batch_num_images")
    return rows if samples is None else _rows_of_samples(rows, torch.as_tensor(samples).tolist(), pixels, images)


def _entries_by_image(arguments: Mapping[str, Any], pixels: str, grid: str | None) -> tuple[int, list[list[int]], bool]:
    """How many images there are; how many entries of an argument each may have: one, as many as it has patches or
    columns of a strip, or as many as another argument says; and whether the pixels are a strip."""
    sizes = arguments.get(grid) if grid else None
    if sizes is not None:
        images, patches, strip = len(sizes), torch.as_tensor(sizes).prod(-1).tolist(), False
    else:
        patches = [count * arguments[pixels].shape[-2] for count in _strip_of_patches(arguments, pixels)]
        images, strip = len(patches) or len(arguments[pixels]), bool(patches)
    return images, [[1] * images, patches, *_counts(arguments, images)], strip


def _rows_of_samples(
    rows: Mapping[str, list[int]], counts: list[int], pixels: str, images: int
) -> dict[str, list[int]] | str:
    """The same by sample, of which each has so many images."""
    if sum(counts) != images:
        return f"batch_num_images has {sum(counts)} images, {pixels} {images}"
    by_sample = {name: [sum(part) for part in _split(own, counts)] for name, own in rows.items()}
    return by_sample | {"batch_num_images": [1] * len(counts)}


def _strip_of_patches(arguments: Mapping[str, Any], pixels: str) -> list[int]:
    """How many patches each image has, where they lie side by side in one strip (1, channels, height, width), and an
    argument has the height and width of each image in patches (MiniCPM); or nothing."""
    strip = arguments[pixels]
    if strip.ndim != 4 or len(strip) != 1:
        return []
    for sizes in arguments.values():
        if isinstance(sizes, Tensor) and sizes.ndim == 2 and sizes.shape[1] == 2 and not sizes.is_floating_point():
            patches = sizes.prod(-1).tolist()
            if len(patches) > 1 and sum(patches) * strip.shape[-2] == strip.shape[-1]:
                return patches
    return []


def _counts(arguments: Mapping[str, Any], images: int) -> list[list[int]]:
    """What may tell how many entries of another argument each image has, such as crops (num_local_patches)."""
    counts = [x for x in arguments.values() if isinstance(x, Tensor) and x.shape == (images,)]
    return [x.tolist() for x in counts if x.dtype in (torch.int32, torch.int64)]


def _has_entries(value: Any) -> bool:
    """Whether an argument may run along images: a tensor, or a list of what is no number."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and isinstance(value[0], list | tuple | Tensor)
    return isinstance(value, Tensor | PixelShard) and value.ndim > 0


def _split(values: list[int], counts: list[int]) -> list[list[int]]:
    """Neighbouring values, so many in each part."""
    ends = [0, *accumulate(counts)]
    return [values[start:stop] for start, stop in pairwise(ends)]


def empty_parts(rows: Mapping[str, list[int]], group: Group) -> str:
    """Which argument would have no entries on a rank, as where only other ranks' images have crops; or nothing."""
    shards = shard_tokens(len(next(iter(rows.values()))), group.size)
    taken = [shards.range(rank) or range(1) for rank in range(group.size)]
    empty = (name for name, counts in rows.items() for part in taken if not sum(counts[part.start : part.stop]))
    return "".join(f"{name} is empty on a rank" for name in list(empty)[:1])


def bounds(arguments: Mapping[str, Any], rows: Mapping[str, list[int]], pixels: str, packed: bool) -> tuple[int, ...]:
    """The shape of the pixels, of all arguments that hold some; where patches are packed, (patches, channels)."""
    shape = tuple(arguments[pixels].shape)
    if sum(rows[pixels]) != shape[0]:  # a strip of patches
        return (shape[-1] // shape[-2], shape[-3] * shape[-2] ** 2)
    if packed:
        return (shape[0], math.prod(shape[1:]))
    shapes = [tuple(arguments[name].shape) for name in rows if getattr(arguments[name], "ndim", 0) == len(shape)]
    return (sum(shape[0] for shape in shapes), *map(max, zip(*[shape[1:] for shape in shapes], strict=True)))


def take_images(
    rows: Mapping[str, list[int]], arguments: Mapping[str, Any], group: Group
) -> tuple[dict[str, Any], bool]:
    """The arguments with this rank's images, or with the first image if it has none, and whether it has any."""
    own = shard_tokens(len(next(iter(rows.values()))), group.size).range(group.rank)
    taken = own or range(1)

    def part(value: Any, counts: list[int]) -> Any:
        start, stop = sum(counts[: taken.start]), sum(counts[: taken.stop])
        return value[start:stop] if len(value) == sum(counts) else value[..., start:stop]  # of a strip

    return {name: part(arguments[name], counts) for name, counts in rows.items()}, bool(own)
