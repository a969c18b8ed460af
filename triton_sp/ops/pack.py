"""The stages pack and unpack: this rank's q, k and v to and from the buffers that travel.

Where heads divide, each rank gets whole heads and addresses have a closed form (`pack_heads`). Elsewhere rows of heads
are cut between ranks and a table of boxes says what goes where (`pack_boxes`). In either pair unpack is the adjoint of
pack: pack reads a key/value head for every rank that needs it, unpack adds up what comes back of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_sp.kernels.mask import Rotation
from triton_sp.ops import dispatch, reference
from triton_sp.ops.differentiable import once_differentiable


def pack_heads(xs: Sequence[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor:
    """Sort heads by the rank that will attend with them.

    Args:
        xs: up to three tensors (T, heads, D) of one dtype, strided in any way but along D. `ranks` divides the heads,
            or these divide the ranks: each of P / heads neighbouring ranks then gets the same head.
        ranks: P.
        rotation: what the first two tensors are normalised and rotated by on the way, in fp32 or wider.

    Returns:
        (P * T * n, D), n the heads of a rank, of all tensors: rank after rank, token by token.

    >>> q = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).unsqueeze(-1)          # 2 tokens, 2 heads, D = 1
    >>> pack_heads([q, q[:, :1]], ranks=2).flatten().tolist()             # a query head and the one key head for each
    [0.0, 0.0, 2.0, 2.0, 1.0, 0.0, 3.0, 2.0]
    """
    if dispatch.portable(xs[0].device) == "reference":
        return reference.pack_heads(xs, ranks, rotation)
    from triton_sp.kernels import pack as kernels

    return kernels.pack(list(xs), ranks, rotation)


def unpack_heads(flat: Tensor, xs: Sequence[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor | None:
    """The adjoint of `pack_heads`, written to `xs`, which may be strided in any way but along D. Sums are formed in
    fp32 or wider, and `rotation` (of `pack_heads`, its adjoint) is applied to the sums.

    Returns:
        (2, D) in fp32 or wider, the gradients of the weights that q and k are normalised with, where these learn.

    >>> q, k = torch.empty(2, 2, 1), torch.empty(2, 1, 1)
    >>> unpack_heads(torch.tensor([0.0, 0.0, 2.0, 2.0, 1.0, 0.0, 3.0, 2.0]).view(8, 1), [q, k], ranks=2)
    >>> q.squeeze(-1).tolist(), k.flatten().tolist()
    ([[0.0, 1.0], [2.0, 3.0]], [0.0, 4.0])
    """
    if dispatch.portable(flat.device) == "reference":
        return reference.unpack_heads(flat, xs, ranks, rotation)
    from triton_sp.kernels import pack as kernels

    return kernels.unpack(flat, list(xs), ranks, rotation)


def rotated(xs: Sequence[Tensor], rotation: Rotation) -> tuple[Tensor, ...]:
    """The first two tensors as `rotation` says, all side by side in one buffer, where no rank is to be sorted for."""
    packed = pack_heads(xs, 1, rotation).view(len(xs[0]), sum(x.shape[1] for x in xs), xs[0].shape[-1])
    return packed.split([x.shape[1] for x in xs], 1)


class Rotate(torch.autograd.Function):
    """q and k normalised and rotated, for layers that attend to what they have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rotation: Rotation, *weights: Tensor) -> tuple[Tensor, ...]:
        """`rotated`; the weights are those of its norm."""
        ctx.rotation = rotation
        ctx.save_for_backward(*((q, k, *weights) if weights else ()))
        return rotated((q, k), rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        """Its adjoint."""
        if ctx.rotation.norm is None:
            return *rotated((dq, dk), ctx.rotation.adjoint), None
        q, k, *weights = ctx.saved_tensors
        flat, grads = torch.cat([dq, dk], 1), (q.new_empty(q.shape), k.new_empty(k.shape))
        dweights = unpack_heads(flat.flatten(0, 1), grads, 1, ctx.rotation.of(q, k, *weights).adjoint)
        return *grads, None, *weights_gradients(dweights, weights)


def weights_gradients(dweights: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """What `unpack_heads` has returned, for each weight in its dtype."""
    if dweights is None:
        return [None] * len(weights)
    return [x.to(weight.dtype) for x, weight in zip(dweights, weights, strict=True)]


def box_table(boxes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Boxes as the functions below take them: int32 (boxes, 7)."""
    return torch.tensor([tuple(box) for box in boxes], dtype=torch.int32).view(-1, 7).to(device, non_blocking=True)


def pack_boxes(xs: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Copy boxes of several tensors into one buffer.

    Args:
        xs: tensors (rows, heads, D) of one dtype, strided in any way but along D.
        boxes: int32 (boxes, 7), see `heads.Box`; they fill the buffer exactly.
        size: vectors of the buffer.

    Returns:
        (size, D) in the dtype of xs.

    >>> q = torch.tensor([[0., 1.], [2., 3.]]).unsqueeze(-1)          # 2 rows, 2 heads, D = 1
    >>> boxes = [(0, 0, 2, 1, 1, 0, 1), (0, 0, 2, 0, 1, 2, 1)]        # head 1 of both rows, then head 0
    >>> pack_boxes([q], box_table(boxes, q.device), 4).flatten().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """
    if dispatch.portable(xs[0].device) == "reference":
        return reference.pack_boxes(xs, boxes.tolist(), size)
    from triton_sp.kernels import boxes as kernels

    return kernels.pack(list(xs), boxes, size)


def unpack_boxes(flat: Tensor, boxes: Tensor, ys: Sequence[Tensor]) -> None:
    """The adjoint of `pack_boxes`, written to `ys`: boxes added up, 0 where there is none. Sums are formed in fp32 or
    wider.

    >>> boxes = box_table([(0, 0, 2, 1, 1, 0, 1), (0, 0, 2, 0, 1, 2, 1)], torch.device("cpu"))
    >>> y = torch.empty(2, 2, 1)
    >>> unpack_boxes(torch.tensor([[1.], [3.], [0.], [2.]]), boxes, [y])
    >>> y.squeeze(-1).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    if dispatch.portable(flat.device) == "reference":
        return reference.unpack_boxes(flat, boxes.tolist(), ys)
    from triton_sp.kernels import boxes as kernels

    return kernels.unpack(flat, boxes, list(ys))
