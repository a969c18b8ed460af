"""A batch as text and bytes, and back: a description in JSON, and the bytes of its tensors. Nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sp.errors import InputError

_ALIGNMENT = 16  # bytes; views of any dtype start at a multiple of their item size
DTYPES = {
    str(dtype)[6:]: dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def describe(value: Any, tensors: list[Tensor], where: str) -> Any:
    """A batch as JSON. Of a tensor it has the dtype and shape; the tensor itself is appended to `tensors`."""
    if isinstance(value, Tensor):
        name = str(value.dtype)[6:]
        if name in DTYPES and value.layout == torch.strided:
            tensors.append(value.detach())
            return ["tensor", name, list(value.shape)]
    elif value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ["dict", [[key, describe(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]]
    elif isinstance(value, list | tuple):
        items = [describe(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return ["list" if isinstance(value, list) else "tuple", items]
    raise InputError(
        where,
        expected="dense tensors, numbers, strings, and dicts, lists and tuples of these",
        found=f"{type(value).__name__}",
        remedy="let the collate function make tensors: nothing else is sent to other ranks",
    )


def rebuild(node: Any, take: Callable[[torch.dtype, list[int]], Tensor]) -> Any:
    """The batch from its description; `take` returns its tensors one after another."""
    kind, content, *shape = node
    if kind == "tensor":
        return take(DTYPES[content], shape[0])
    if kind == "value":
        return content
    if kind == "dict":
        return {key: rebuild(item, take) for key, item in content}
    items = [rebuild(item, take) for item in content]
    return items if kind == "list" else tuple(items)


def room(tensor: Tensor) -> int:
    """The bytes from the start of a tensor in a payload to the start of the next one."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def serialise(tensors: list[Tensor]) -> Tensor:
    """The bytes of all tensors, one after another, as one uint8 tensor on the CPU."""
    payload = torch.zeros(sum(map(room, tensors)), dtype=torch.uint8)
    start = 0
    for tensor in tensors:
        payload[start : start + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
        start += room(tensor)
    return payload


def deserialise(payload: Tensor) -> Callable[[torch.dtype, list[int]], Tensor]:
    """A function that returns views of a payload, one after another. A description cannot reach beyond the payload."""
    start = 0

    def take(dtype: torch.dtype, shape: list[int]) -> Tensor:
        nonlocal start
        size = dtype.itemsize * math.prod(shape)
        tensor = payload[start : start + size].view(dtype).view(shape)
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
        return tensor

    return take
