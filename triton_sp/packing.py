"""The operators of the stages pack and unpack: boxes of rows x heads, to and from one flat buffer of D-vectors.

The two are each other's adjoint: unpack adds up where boxes overlap (a key/value head that several ranks need), pack
reads such rows several times. A buffer is filled exactly once by its boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_sp import reference


@torch.library.custom_op("triton_sp::pack", mutates_args=())
def _pack(xs: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    return reference.pack(xs, boxes.tolist(), size)


@torch.library.custom_op("triton_sp::unpack", mutates_args=())
def _unpack(flat: Tensor, boxes: Tensor, rows: list[int], heads: list[int]) -> list[Tensor]:
    return reference.unpack(flat, boxes.tolist(), rows, heads)


@_pack.register_fake
def _(xs: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    return xs[0].new_empty(size, xs[0].shape[-1])


@_unpack.register_fake
def _(flat: Tensor, boxes: Tensor, rows: list[int], heads: list[int]) -> list[Tensor]:
    return [flat.new_empty(t, h, flat.shape[-1]) for t, h in zip(rows, heads, strict=True)]


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, boxes, _ = inputs
    ctx.save_for_backward(boxes)
    ctx.rows, ctx.heads = [x.shape[0] for x in xs], [x.shape[1] for x in xs]


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    return _unpack(grad, boxes, ctx.rows, ctx.heads), None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.size = inputs[0].shape[0]


def _unpack_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    return _pack(grads, boxes, ctx.size), None, None, None


_pack.register_autograd(_pack_backward, setup_context=_setup_pack)
_unpack.register_autograd(_unpack_backward, setup_context=_setup_unpack)


def box_table(boxes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Boxes as the operators take them: int32 (boxes, 7)."""
    return torch.tensor([tuple(box) for box in boxes], dtype=torch.int32).view(-1, 7).to(device, non_blocking=True)


def pack(xs: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Copy boxes of several tensors into one buffer.

    Args:
        xs: tensors (rows, heads, D) of one dtype, strided in any way but along D.
        boxes: int32 (boxes, 7), see `heads.Box`; they fill the buffer exactly.
        size: vectors of the buffer.

    Returns:
        (size, D) in the dtype of xs.

    >>> q = torch.tensor([[0., 1.], [2., 3.]]).unsqueeze(-1)          # 2 rows, 2 heads, D = 1
    >>> boxes = [(0, 0, 2, 1, 1, 0, 1), (0, 0, 2, 0, 1, 2, 1)]        # head 1 of both rows, then head 0
    >>> pack([q], box_table(boxes, q.device), 4).flatten().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """
    return _pack(list(xs), boxes, size)


def unpack(flat: Tensor, boxes: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Add the boxes of a buffer to tensors that are 0 elsewhere.

    Args:
        flat: (size, D).
        boxes: as for `pack`.
        shapes: (rows, heads) of each tensor.

    Returns:
        Tensors (rows, heads, D) in the dtype of flat; sums are formed in fp32 or wider.

    >>> boxes = box_table([(0, 0, 2, 1, 1, 0, 1), (0, 0, 2, 0, 1, 2, 1)], torch.device("cpu"))
    >>> unpack(torch.tensor([[1.], [3.], [0.], [2.]]), boxes, [(2, 2)])[0].squeeze(-1).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    return _unpack(flat, boxes, [rows for rows, _ in shapes], [heads for _, heads in shapes])
