"""Samples of text and pictures, each a document: its fields as tensors, and those of several samples joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sp.anatomy.families import TOKEN_TYPES
from triton_sp.errors import InputError
from triton_sp.loss import IGNORE

TOKENS = ("input_ids", "labels", *TOKEN_TYPES)
_SIZES = ("image_sizes", "pixel_attention_mask", "batch_num_images")  # with them, pixels may be padded with zeros
_PICTURES = ("pixel", "image", "video")
Sample = Mapping[str, Any]


def row_of(sample: Sample) -> dict[str, Any]:
    """One document: its tokens (1, S) without padding, and its pictures as they are.

    Raises:
        InputError: it is not one row, or has a field for each token that is not known.
    """
    if not isinstance(sample, Mapping) or "input_ids" not in sample:
        found = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
        remedy = "PackingCollator(model, collate) with a function that makes a batch of a sample"
        raise InputError("sample", expected="a mapping with input_ids", found=f"{found}", remedy=remedy)
    row = {name: value for name, value in sample.items() if name != "position_ids" and value is not None}
    marks = {name: torch.as_tensor(row.pop(name)) for name in (*TOKENS, "attention_mask") if name in row}
    marks = {name: value[None] if value.ndim == 1 else value for name, value in marks.items()}
    shape = (1, marks["input_ids"].shape[1])
    if any(value.shape != shape for value in marks.values()):
        raise InputError(
            "sample",
            expected="one row, with an entry a token in each of its fields",
            found=", ".join(f"{name} {tuple(value.shape)}" for name, value in marks.items()),
            remedy="let collate make a batch of the one sample that it is given",
        )
    _refuse_unknown(row, shape)
    keep = marks.pop("attention_mask", torch.ones(shape))[0] != 0
    return {name: value[:, keep] for name, value in marks.items()} | row


def _refuse_unknown(row: dict[str, Any], shape: tuple[int, int]) -> None:
    for name, value in row.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape and not name.startswith(_PICTURES):
            remedy = "leave it out, if the model does; its tokens are not packed yet"
            found = f"one for each token, {tuple(value.shape)}"
            raise InputError(name, expected="entries for pictures", found=found, remedy=remedy)


def tokens_of(row: dict[str, Any], name: str) -> Tensor:
    """(1, S) of one document: a type of 0 where it has none. Its first label is no other document's to predict."""
    value = row.get(name)
    if name != "labels":
        return torch.zeros_like(row["input_ids"]) if value is None else value
    value = torch.full_like(row["input_ids"], IGNORE) if value is None else value.clone()
    value[:, :1] = IGNORE
    return value


def joined(name: str, rows: list[dict[str, Any]], axis: int) -> Any:
    """A field of the pictures of all samples, along an axis.

    Raises:
        InputError: it is neither lists nor tensors that fit one another.
    """
    parts = [row[name] for row in rows if row.get(name) is not None]
    if all(isinstance(part, list | tuple) for part in parts):
        return [item for part in parts for item in part]
    padded = any(key in row for row in rows for key in _SIZES)
    if not _fit(parts, axis, padded):
        raise InputError(
            name,
            expected="tensors of the pictures of each sample, of like shapes",
            found=", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else f"{part!r:.40}" for part in parts),
            remedy="leave out fields that the model does not take, and give all pictures one size",
        )
    most = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    return torch.cat([_padded(part, most, axis) for part in parts], axis)


def _fit(parts: list[Any], axis: int, padded: bool) -> bool:
    """Whether these can be joined along an axis; `padded`: where they are as long in the others as the longest."""
    if not all(isinstance(part, Tensor) and part.ndim == parts[0].ndim > axis for part in parts):
        return False
    return padded or len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) == 1


def _padded(x: Tensor, most: list[int], axis: int) -> Tensor:
    """Zeros behind the pixels in all axes but one, as processors pad."""
    out = x.new_zeros([size if i == axis else most[i] for i, size in enumerate(x.shape)])
    out[tuple(map(slice, x.shape))] = x
    return out
