"""pack and unpack where heads divide: one launch for q, k and v, addresses in closed form, each byte read and written
once.

Shapes: up to three tensors x (T, heads, D), strided but along D. Each of P ranks gets `n` neighbouring heads of each:
n = heads / P, or 1 where there are fewer heads than ranks, one head then going to `copies` = P / heads of them. The
buffer is (P, T, slot, D), slot = the sum of n over the tensors: token by token, as the receiver's stream wants it. The
first two tensors can be normalised, head by head, and rotated by the positions of their rows on the way.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.mask import Rotation

RUNTIME = [
    "rows", "slot", *(f"{name}{i}" for name in ("row", "head", "n", "copies") for i in range(3)),
    *(f"{name}{i}" for name in ("from_row", "from_head") for i in range(2)),
]  # fmt: skip
UNITS = 256  # of 8 elements in a tile: two 16-byte accesses a thread of 4 warps
ROTATED = 128  # where some are rotated, each with three more loads: with 256 the adjoint spills 24 bytes on sm_100


@triton.jit
def places(at, rows, n, row_stride, head_stride, first, D: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr,
           BU: tl.constexpr):  # fmt: skip
    """The units of a tile: where they are in a tensor, their rows and heads, and which of their head's units they are:
    (BU, 1) each; and which numbers exist (BU, STRIDE).

    A head is D / STRIDE units in PAD places, and the tile has BU of all heads' places, from number `at` on. Counted in
    units of 8 elements, every address is seen to be a multiple of 16 bytes, at any head dim and stride.
    """
    number = at + tl.arange(0, BU)[:, None]
    column, head = number % PAD, number // PAD
    t, head = (head // n).to(tl.int64), head % n
    x = t * row_stride + (first + head) * head_stride.to(tl.int64) + column
    here = (t < rows) & (tl.arange(0, STRIDE)[None, :] >= 0)
    if PAD * STRIDE != D:
        here &= column < D // STRIDE
    return x, t, head, column, here


@triton.jit
def arrival(t, head, column, rank, rows, offset, slot, D: tl.constexpr, STRIDE: tl.constexpr):
    """Where units are in the buffer."""
    return ((rank.to(tl.int64) * rows + t) * slot + offset + head) * (D // STRIDE) + column


@triton.jit
def numbers(unit, STRIDE: tl.constexpr):
    """The offsets of a unit's numbers."""
    return unit * STRIDE + tl.arange(0, STRIDE)[None, :]


@triton.jit
def away(column, ROTARY: tl.constexpr, STRIDE: tl.constexpr):
    """How many units further on the unit is with which a unit of a head is turned; 0 for those that are not."""
    half: tl.constexpr = ROTARY // 2 // STRIDE
    return tl.where(column < half, half, tl.where(column < 2 * half, -half, 0))


@triton.jit
def turn(own, other, cos_ptr, sin_ptr, t, column, turns, ROTARY: tl.constexpr, BACK: tl.constexpr,
         STRIDE: tl.constexpr):  # fmt: skip
    """A tile whose units are turned with `other`, those `away` from them; see `ops.reference.turn`."""
    at = t * (ROTARY // STRIDE) + column
    cos = tl.load(cos_ptr + numbers(at, STRIDE), mask=turns, other=1.0).to(own.dtype)
    if BACK:
        at += away(column, ROTARY, STRIDE)
    sin = tl.load(sin_ptr + numbers(at, STRIDE), mask=turns, other=0.0).to(own.dtype)
    first = column < ROTARY // 2 // STRIDE
    return own * cos + (tl.where(first, sin, -sin) if BACK else tl.where(first, -sin, sin)) * other


@triton.jit
def head_mean(x, D: tl.constexpr, PAD: tl.constexpr, BU: tl.constexpr):
    """The mean of each unit's head, (BU, 1). The heads of a tile are whole, and 0 where nothing is."""
    mean = tl.sum(tl.reshape(tl.sum(x, 1), [BU // PAD, PAD]), 1, keep_dims=True) / D
    return tl.reshape(tl.broadcast_to(mean, [BU // PAD, PAD]), [BU, 1])


@triton.jit
def factor(weight_ptr, column, here, OFFSET: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr):
    """What normalised units are multiplied by."""
    return tl.load(weight_ptr + numbers(column, STRIDE), mask=here, other=0.0).to(WIDE) + OFFSET


@triton.jit
def send(x_ptr, flat_ptr, cos_ptr, sin_ptr, weight_ptr, tile, rows, rank, offset, n, copies, slot, row_stride,
         head_stride, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROTARY: tl.constexpr,
         BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr,
         BU: tl.constexpr):  # fmt: skip
    """A tile of one tensor to one rank's part of the buffer."""
    x, t, head, column, here = places(
        tile * BU, rows, n, row_stride, head_stride, rank * n // copies, D, PAD, STRIDE, BU
    )
    value = tl.load(x_ptr + numbers(x, STRIDE), mask=here, other=0.0)
    if NORM:
        value = value.to(WIDE)
        scale = tl.rsqrt(head_mean(value * value, D, PAD, BU) + EPS)
        value *= scale * factor(weight_ptr, column, here, OFFSET, WIDE, STRIDE)
    if ROTARY:
        turns, far = here & (column < ROTARY // STRIDE), away(column, ROTARY, STRIDE)
        other = tl.load(x_ptr + numbers(x + far, STRIDE), mask=turns, other=0.0).to(WIDE)
        if NORM:
            other *= scale * factor(weight_ptr, column + far, turns, OFFSET, WIDE, STRIDE)
        value = turn(value.to(WIDE), other, cos_ptr, sin_ptr, t, column, turns, ROTARY, BACK, STRIDE)
    flat = arrival(t, head, column, rank, rows, offset, slot, D, STRIDE)
    tl.store(flat_ptr + numbers(flat, STRIDE), value.to(flat_ptr.dtype.element_ty), mask=here)


@triton.jit
def collect(x_ptr, flat_ptr, cos_ptr, sin_ptr, weight_ptr, from_ptr, sums_ptr, tile, rows, group, offset, n, copies,
            slot, row_stride, head_stride, from_row, from_head, NORM: tl.constexpr, EPS: tl.constexpr,
            OFFSET: tl.constexpr, LEARNS: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr,
            D: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr):  # fmt: skip
    """The adjoint: a tile of the heads that `copies` ranks have had, summed over them."""
    x, t, head, column, here = places(tile * BU, rows, n, row_stride, head_stride, group * n, D, PAD, STRIDE, BU)
    turns = here & (column < ROTARY // STRIDE)
    total, others = tl.zeros([BU, STRIDE], WIDE), tl.zeros([BU, STRIDE], WIDE)
    for copy in range(copies):
        flat = arrival(t, head, column, group * copies + copy, rows, offset, slot, D, STRIDE)
        total += tl.load(flat_ptr + numbers(flat, STRIDE), mask=here, other=0.0).to(WIDE)
        if ROTARY:
            other = flat + away(column, ROTARY, STRIDE)
            others += tl.load(flat_ptr + numbers(other, STRIDE), mask=turns, other=0.0).to(WIDE)
    if ROTARY:
        total = turn(total, others, cos_ptr, sin_ptr, t, column, turns, ROTARY, BACK, STRIDE)
    if NORM:
        source = t * from_row + (group * n + head) * from_head.to(tl.int64) + column
        value = tl.load(from_ptr + numbers(source, STRIDE), mask=here, other=0.0).to(WIDE)
        scale = tl.rsqrt(head_mean(value * value, D, PAD, BU) + EPS)
        value *= scale
        if LEARNS:
            of_heads = tl.sum(tl.reshape(value * total, [BU // PAD, PAD * STRIDE]), 0)
            at = tl.arange(0, PAD * STRIDE)
            tl.store(sums_ptr + at, of_heads, mask=at < D)
        total *= factor(weight_ptr, column, here, OFFSET, WIDE, STRIDE)
        total = scale * (total - value * head_mean(value * total, D, PAD, BU))
    tl.store(x_ptr + numbers(x, STRIDE), total.to(x_ptr.dtype.element_ty), mask=here)


@triton.jit
def tiles(rows, n, PAD: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr):
    """How many tiles a tensor has for a rank. 32 bits, which divide faster, count all units of 8 elements."""
    if STRIDE == 1:
        return tl.cdiv(rows.to(tl.int64) * n * PAD, BU)
    return tl.cdiv(rows * n * PAD, BU)


@triton.jit(do_not_specialize=RUNTIME)
def pack_heads(
    x0, x1, x2, flat, cos, sin, weight0, weight1, rows, slot, row0, head0, row1, head1, row2, head2, n0, n1, n2,
    copies0, copies1, copies2, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROTARY: tl.constexpr,
    BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """One program a tile and rank: first the tiles of one tensor, then those of the next. The first two are normalised
    and rotated, if any are.

    Example: q = ((0, 1), (2, 3)), D = 1, no k and v, 2 ranks -> flat = (0, 2, 1, 3).
    """
    rank = tl.program_id(1)
    first, second = tiles(rows, n0, PAD, STRIDE, BU), tiles(rows, n1, PAD, STRIDE, BU)
    tile = tl.program_id(0) + first * 0  # as wide as `first`
    if tile < first:
        send(x0, flat, cos, sin, weight0, tile, rows, rank, 0, n0, copies0, slot, row0, head0,
             NORM, EPS, OFFSET, ROTARY, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip
    elif tile < first + second:
        send(x1, flat, cos, sin, weight1, tile - first, rows, rank, n0, n1, copies1, slot, row1, head1,
             NORM, EPS, OFFSET, ROTARY, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip
    else:
        send(x2, flat, cos, sin, weight0, tile - first - second, rows, rank, n0 + n1, n2, copies2, slot, row2, head2,
             0, EPS, OFFSET, 0, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def unpack_heads(
    x0, x1, x2, flat, cos, sin, weight0, weight1, rows, slot, row0, head0, row1, head1, row2, head2, n0, n1, n2,
    copies0, copies1, copies2, from0, from1, sums0, sums1, from_row0, from_head0, from_row1, from_head1,
    NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr,
    LEARNS: tl.constexpr,
):  # fmt: skip
    """The adjoint of pack_heads: what ranks have had twice is added up. A permutation where none has. Each program
    sums its own share of the gradients of the norms' weights.

    Example: flat = (1, 2, 3, 4), one head for 2 ranks, D = 1 -> x = (1 + 3, 2 + 4).
    """
    group, ranks = tl.program_id(1), tl.num_programs(1)
    first, second = tiles(rows, n0, PAD, STRIDE, BU), tiles(rows, n1, PAD, STRIDE, BU)
    tile = tl.program_id(0) + first * 0
    if tile < first:
        if group * copies0 < ranks:
            collect(x0, flat, cos, sin, weight0, from0, sums0 + (tile * (ranks // copies0) + group).to(tl.int64) * D,
                    tile, rows, group, 0, n0, copies0, slot, row0, head0, from_row0, from_head0,
                    NORM, EPS, OFFSET, LEARNS, ROTARY, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip
    elif tile < first + second:
        tile -= first
        if group * copies1 < ranks:
            collect(x1, flat, cos, sin, weight1, from1, sums1 + (tile * (ranks // copies1) + group).to(tl.int64) * D,
                    tile, rows, group, n0, n1, copies1, slot, row1, head1, from_row1, from_head1,
                    NORM, EPS, OFFSET, LEARNS, ROTARY, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip
    else:
        if group * copies2 < ranks:
            collect(x2, flat, cos, sin, weight0, x2, sums0, tile - first - second, rows, group, n0 + n1, n2, copies2,
                    slot, row2, head2, row2, head2,
                    0, EPS, OFFSET, 0, 0, BACK, WIDE, D, PAD, STRIDE, BU)  # fmt: skip


def _per_rank(xs: list[Tensor], ranks: int) -> list[int]:
    """How many heads of each tensor a rank gets."""
    return [max(1, x.shape[1] // ranks) for x in xs]


class _Launch(NamedTuple):
    """The programs of each tensor for a rank, the arguments of both kernels, and the constants; what the strides of all
    tensors are counted in, of this many numbers."""

    tiles: list[int]
    arguments: list[Any]
    constants: dict[str, Any]
    unit: int


def _launch(xs: list[Tensor], flat: Tensor, ranks: int, rotation: Rotation | None, others: list[Tensor]) -> _Launch:
    """How a kernel is launched; strides of `others` are to be counted too."""
    x, dim, heads = xs[0], xs[0].shape[-1], _per_rank(xs, ranks)
    cos, sin, back, norm = (x, x, False, None) if rotation is None else rotation
    rotary = 0 if rotation is None else cos.shape[-1]
    weights, eps, offset = ((x, x), 1.0, 0.0) if norm is None else norm[:3]
    stride, strides = launch.strides(*xs, *others)
    unit = math.gcd(stride, dim, rotary // 2)  # what is turned with one another is whole units apart
    pad = dim // unit if norm is None else triton.next_power_of_2(dim // unit)  # then a tile has whole heads
    tile = max(ROTATED, pad) if rotary else UNITS
    copies, missing = [max(1, ranks // x.shape[1]) for x in xs], 3 - len(xs)
    arguments = [
        *xs, *[x] * missing, flat, cos.contiguous(), sin.contiguous(), *weights, x.shape[0], sum(heads),
        *(size * (stride // unit) for size in strides[: 2 * len(xs)]), *[0] * (2 * missing),
        *heads, *[0] * missing, *copies, *[1] * missing,
    ]  # fmt: skip
    constants = {
        "NORM": int(norm is not None), "EPS": eps, "OFFSET": offset, "ROTARY": rotary, "BACK": back,
        "WIDE": tl.float64 if flat.dtype == torch.float64 else tl.float32,
        "D": dim, "PAD": pad, "STRIDE": unit, "BU": tile, "num_warps": 4,
    }  # fmt: skip
    return _Launch([triton.cdiv(x.shape[0] * n * pad, tile) for n in heads], arguments, constants, unit)


def pack(xs: list[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor:
    """(P * T * slot, D): each rank's heads of up to three tensors of one dtype, the first two as `rotation` says."""
    xs = [launch.dense_rows(x) for x in xs]
    flat = xs[0].new_empty(ranks * xs[0].shape[0] * sum(_per_rank(xs, ranks)), xs[0].shape[-1])
    how = _launch(xs, flat, ranks, rotation, [])
    if sum(how.tiles):
        with torch.cuda.device_of(flat):
            pack_heads[sum(how.tiles), ranks](*how.arguments, **how.constants)
    return flat


def unpack(flat: Tensor, xs: list[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor | None:
    """Write the tensors that `pack` has read, which may be strided but along D; sums are formed in fp32 or wider.

    Returns:
        (2, D), the gradients of the weights of the norms, in fp32 or wider, where these learn.
    """
    norm = None if rotation is None else rotation.norm
    rows = [] if norm is None else [launch.dense_rows(x) for x in norm.rows]
    how = _launch(xs, flat.contiguous(), ranks, rotation, rows)
    sums, learns = [flat, flat], norm is not None and norm.learns
    if learns:
        wide = torch.promote_types(flat.dtype, torch.float32)
        shapes = [(n, min(ranks, x.shape[1]), x.shape[2]) for n, x in zip(how.tiles, rows, strict=False)]
        sums = [flat.new_empty(shape, dtype=wide) for shape in shapes]
    if sum(how.tiles):
        sources = [*(rows or xs[:1] * 2), *sums, *(x.stride(i) // how.unit for x in rows or xs[:1] * 2 for i in (0, 1))]
        with torch.cuda.device_of(flat):
            unpack_heads[sum(how.tiles), ranks](*how.arguments, *sources, **how.constants, LEARNS=int(learns))
    return torch.stack([x.sum((0, 1)) for x in sums]) if learns else None
