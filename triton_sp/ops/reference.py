"""The eager PyTorch twins of pack, unpack and splice: what the kernels are tested against, and the CPU path. The twin
of attend is in attend_cpu.py.

Shape letters, here and everywhere: T local tokens, S tokens of the whole stream, H heads, K key/value heads, D head
dim, P ranks, B batch, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_sp.kernels.mask import Norm, Rotation


def turn(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embeddings, half of the d rotated numbers turned with the other, in float32 or wider:

        out[i] = x[i] cos[i] - x[i + d/2] sin[i],  out[i + d/2] = x[i + d/2] cos[i + d/2] + x[i] sin[i + d/2]

    >>> quarter = Rotation(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    >>> turned = turn(torch.tensor([[[1.0, 2.0, 3.0]]]), quarter)          # the third number is not rotated
    >>> turned.tolist(), turn(turned, quarter.adjoint).tolist()
    ([[[-2.0, 1.0, 3.0]]], [[[1.0, 2.0, 3.0]]])
    """
    wide = torch.promote_types(torch.promote_types(x_THD.dtype, rotation.cos.dtype), torch.float32)
    cos, sin = (table[:, None].to(wide) for table in rotation[:2])
    turned, whole = x_THD[..., : cos.shape[-1]].to(wide), x_THD.shape[-1] == cos.shape[-1]
    if rotation.back:
        first, second = (turned * sin).chunk(2, -1)
        turned = turned * cos + torch.cat([second, -first], -1)
    else:
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-second, first], -1) * sin
    return turned if whole else torch.cat([turned, x_THD[..., cos.shape[-1] :].to(wide)], -1)


def normalise(x_THD: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """RMS norms of heads, in float32 or wider: x / sqrt(mean(x^2) + eps) * (offset + weight).

    >>> norm = Norm((torch.ones(2), torch.ones(2)), eps=0.0, offset=1.0)
    >>> normalise(torch.tensor([[[3.0, -3.0]]]), norm.weights[0], norm).tolist()
    [[[2.0, -2.0]]]
    """
    x, scale = _scaled(x_THD, norm)
    return x * scale * (norm.offset + weight.to(x.dtype))


def normalise_adjoint(dy_THD: Tensor, x_THD: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The gradients of `x_THD` and of the weight, (D,)."""
    x, scale = _scaled(x_THD, norm)
    unit, inner = x * scale, dy_THD * (norm.offset + weight.to(x.dtype))
    return scale * (inner - unit * (unit * inner).mean(-1, keepdim=True)), (dy_THD * unit).sum((0, 1))


def _scaled(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x in float32 or wider, and one over the root of its heads' mean squares."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def pack_heads(xs: Sequence[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor:
    """Each rank's heads of several tensors in one buffer; see `pack.pack_heads`."""
    rows, _, dim = xs[0].shape
    flat = xs[0].new_empty(ranks, rows, sum(_per_rank(x, ranks) for x in xs), dim)
    for i, (x, part) in enumerate(zip(xs, flat.split([_per_rank(x, ranks) for x in xs], 2), strict=True)):
        if rotation is not None and i < 2:
            x = x if rotation.norm is None else normalise(x, rotation.norm.weights[i], rotation.norm)
            x = turn(x, rotation)
        part.copy_(_by_rank(x, ranks).transpose(0, 1))
    return flat.flatten(0, 2)


def unpack_heads(flat: Tensor, xs: Sequence[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor | None:
    """The adjoint, written to `xs`; see `pack.unpack_heads`."""
    sizes, norm, dweights = [_per_rank(x, ranks) for x in xs], None if rotation is None else rotation.norm, []
    parts = flat.view(ranks, len(xs[0]), sum(sizes), flat.shape[-1]).split(sizes, 2)
    for i, (x, part) in enumerate(zip(xs, parts, strict=True)):
        if x.shape[1] < ranks:  # (T, heads, 1, D)
            wide = torch.promote_types(flat.dtype, torch.float32)
            states = part.unflatten(0, (x.shape[1], -1)).sum(1, dtype=wide).transpose(0, 1)
        else:  # (T, P, n, D)
            states = part.transpose(0, 1)
        groups = states.shape[1:3]
        if rotation is not None and i < 2:
            states = turn(states.flatten(1, 2), rotation)
            if norm is not None:
                states, dweight = normalise_adjoint(states, norm.rows[i], norm.weights[i], norm)
                dweights.append(dweight)
            states = states.unflatten(1, groups)
        x.unflatten(1, groups).copy_(states)
    return torch.stack(dweights) if norm is not None and norm.learns else None


def _per_rank(x: Tensor, ranks: int) -> int:
    return max(1, x.shape[1] // ranks)


def _by_rank(x_THD: Tensor, ranks: int) -> Tensor:
    """(T, P, n, D), the n heads of each rank."""
    heads = x_THD.shape[1]
    if heads < ranks:
        return x_THD[:, :, None].expand(-1, -1, ranks // heads, -1).flatten(1, 2)[:, :, None]
    return x_THD.unflatten(1, (ranks, -1))


def pack_boxes(xs: Sequence[Tensor], boxes: Sequence[Sequence[int]], size: int) -> Tensor:
    """Boxes of several tensors in one buffer; see `pack.pack_boxes`."""
    flat = xs[0].new_empty(size, xs[0].shape[-1])
    for tensor, row, rows, head, heads, start, stride in boxes:
        _window(flat, rows, heads, start, stride).copy_(xs[tensor][row : row + rows, head : head + heads])
    return flat


def unpack_boxes(flat: Tensor, boxes: Sequence[Sequence[int]], ys: Sequence[Tensor]) -> None:
    """The boxes of a buffer added up in `ys`; see `pack.unpack_boxes`."""
    flat, wide = flat.contiguous(), torch.promote_types(flat.dtype, torch.float32)
    sums = [torch.zeros(y.shape, dtype=wide, device=y.device) for y in ys]
    for tensor, row, rows, head, heads, start, stride in boxes:
        sums[tensor][row : row + rows, head : head + heads] += _window(flat, rows, heads, start, stride)
    for y, total in zip(ys, sums, strict=True):
        y.copy_(total)


def _window(flat: Tensor, rows: int, heads: int, start: int, stride: int) -> Tensor:
    """(rows, heads, D) of a buffer (size, D): `heads` neighbouring vectors, every `stride`."""
    dim = flat.shape[-1]
    return flat.as_strided((rows, heads, dim), (stride * dim, dim, 1), flat.storage_offset() + start * dim)


def splice(text: Tensor | None, visual: Tensor, index: Tensor) -> Tensor:
    """Rows of visual where index >= 0, of text elsewhere, 0 where there is no such row. See `splicing.splice`."""
    text = visual[:0] if text is None else text
    out = visual.new_zeros(len(index), visual.shape[1])
    seen, read = index >= 0, (index < 0) & (index > -1 - len(text))
    out[seen] = visual[index[seen]]
    out[read] = text[-1 - index[read]]
    return out
