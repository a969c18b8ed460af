"""The operators of the stages pack and unpack: boxes of rows x heads, to and from one flat buffer of D-vectors.

The two are each other's adjoint: unpack adds up where boxes overlap (a key/value head that several ranks need), pack
reads such rows several times. A buffer is filled exactly once by its boxes. For people's own scripts `pack_rotated`
norms and rotates queries and keys on the way; in Hugging Face models that has happened where attention is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_sp.ops import reference
from triton_sp.ops.dispatch import implementation


def _uses_kernels(x: Tensor) -> bool:
    return implementation(x.device) != "reference"


@torch.library.custom_op("triton_sp::pack", mutates_args=())
def _pack(xs: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    if _uses_kernels(xs[0]):
        from triton_sp.kernels import pack as kernels

        return kernels.pack(xs, boxes, size)
    return reference.pack(xs, boxes.tolist(), size)


@torch.library.custom_op("triton_sp::unpack", mutates_args=())
def _unpack(flat: Tensor, boxes: Tensor, rows: list[int], heads: list[int]) -> list[Tensor]:
    if _uses_kernels(flat):
        from triton_sp.kernels import pack as kernels

        return kernels.unpack(flat, boxes, rows, heads)[0]
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


# --- with norm and rotation ----------------------------------------------------------------------------------------


@torch.library.custom_op("triton_sp::pack_rotated", mutates_args=())
def _pack_rotated(
    xs: list[Tensor],
    boxes: Tensor,
    size: int,
    tables: list[Tensor],
    weights: list[Tensor],
    eps: float,
    interleaved: bool,
) -> Tensor:
    turn, norm = _pair(tables), _pair(weights)
    if _uses_kernels(xs[0]):
        from triton_sp.kernels import pack as kernels

        return kernels.pack(xs, boxes, size, turn, norm, eps, 2 if interleaved else 1)
    q, k = (
        reference.norm_and_rotate(x, turn, norm[i] if norm else None, eps, interleaved) for i, x in enumerate(xs[:2])
    )
    return reference.pack([q, k, xs[2]], boxes.tolist(), size)


@torch.library.custom_op("triton_sp::pack_rotated_backward", mutates_args=())
def _pack_rotated_backward(
    grad: Tensor,
    boxes: Tensor,
    xs: list[Tensor],
    tables: list[Tensor],
    weights: list[Tensor],
    eps: float,
    interleaved: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, and of the two weights if there are any."""
    rows, heads = [x.shape[0] for x in xs], [x.shape[1] for x in xs]
    turn, norm = _pair(tables), _pair(weights)
    if _uses_kernels(grad):
        from triton_sp.kernels import pack as kernels

        grads, dws = kernels.unpack(grad, boxes, rows, heads, xs, turn, norm, eps, 2 if interleaved else 1)
    else:
        grads, dws = reference.unpack(grad, boxes.tolist(), rows, heads), []
        for i in range(2):
            weight = norm[i] if norm else None
            grads[i], dw = reference.norm_and_rotate_backward(grads[i], xs[i], turn, weight, eps, interleaved)
            dws.append(dw)
    return grads + [dw.to(weight.dtype) for dw, weight in zip(dws, weights, strict=False)]


def _pair(tensors: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    return (tensors[0], tensors[1]) if tensors else None


@_pack_rotated.register_fake
def _(
    xs: list[Tensor],
    boxes: Tensor,
    size: int,
    tables: list[Tensor],
    weights: list[Tensor],
    eps: float,
    interleaved: bool,
) -> Tensor:
    return xs[0].new_empty(size, xs[0].shape[-1])


@_pack_rotated_backward.register_fake
def _(
    grad: Tensor,
    boxes: Tensor,
    xs: list[Tensor],
    tables: list[Tensor],
    weights: list[Tensor],
    eps: float,
    interleaved: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs] + [torch.empty_like(weight) for weight in weights]


def _setup_rotated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, boxes, _, tables, weights, ctx.eps, ctx.interleaved = inputs
    ctx.save_for_backward(boxes, *xs, *tables, *weights)
    ctx.tables = len(tables)


def _rotated_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, *rest = ctx.saved_tensors
    xs, tables, weights = rest[:3], rest[3 : 3 + ctx.tables], rest[3 + ctx.tables :]
    grads = _pack_rotated_backward(grad, boxes, xs, tables, weights, ctx.eps, ctx.interleaved)
    return grads[:3], None, None, [None] * len(tables), grads[3:], None, None


_pack_rotated.register_autograd(_rotated_backward, setup_context=_setup_rotated)


def pack_rotated(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    boxes: Tensor,
    size: int,
    *,
    tables: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> Tensor:
    """`pack` of q, k and v with q and k normed and rotated on the way: one pass over memory, forward and backward.

    Args:
        boxes, size: as for `pack`; tensor 0 is q, 1 is k, 2 is v.
        tables: cos and sin (T, D) of this rank's tokens, without a gradient: whatever positions they were made from
            (1-D, 2-D of an image, M-RoPE). None for no rotation.
        weights: of the RMSNorm over D of queries and of keys, (D,) each. None for no norm.
        eps: of the norm.
        interleaved: columns (0, 1), (2, 3), ... form the pairs that are rotated, not (0, D/2), (1, D/2 + 1), ...

    Returns:
        (size, D) in the dtype of q; norm and rotation are computed in fp32 or wider.

    >>> q, half = torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 2)      # 1 token, 1 head, D = 2, a quarter turn
    >>> boxes = box_table([(i, 0, 1, 0, 1, i, 1) for i in range(3)], q.device)
    >>> pack_rotated(q, q, q, boxes, 3, tables=(half, half + 1)).tolist()
    [[-2.0, 1.0], [-2.0, 1.0], [1.0, 2.0]]
    """
    return _pack_rotated([q_THD, k_TKD, v_TKD], boxes, size, list(tables or ()), list(weights or ()), eps, interleaved)
