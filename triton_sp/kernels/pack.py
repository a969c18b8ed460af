"""pack and unpack where heads divide: one launch for q, k and v, addresses in closed form, each byte read and written
once.

Shapes: up to three tensors x (T, heads, D), strided but along D. Each of P ranks gets `n` neighbouring heads of each:
n = heads / P, or 1 where there are fewer heads than ranks, one head then going to `copies` = P / heads of them. The
buffer is (P, T, slot, D), slot = the sum of n over the tensors: token by token, as the receiver's stream wants it. The
first two tensors can be rotated by the positions of their rows on the way.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.mask import Rotation

RUNTIME = ["rows", "slot", *(f"{name}{i}" for name in ("row", "head", "n", "copies") for i in range(3))]
UNITS = 256  # of 8 elements in a tile: two 16-byte accesses a thread of 4 warps
ROTATED = 128  # where some are rotated, each with three more loads: with 256 the adjoint spills 24 bytes on sm_100


@triton.jit
def places(at, rows, rank, offset, n, slot, row_stride, head_stride, first,
           D: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr):  # fmt: skip
    """The units of a tile: where they are in a tensor and in the buffer, their rows, and which of their head's units
    they are: (BU, 1) each; and which numbers exist (BU, STRIDE).

    A row of `n` heads is n * D / STRIDE units, and the tile has BU of all rows' units, from number `at` on: whole at
    any number of heads. Counted in units of 8 elements, every address is seen to be a multiple of 16 bytes, at any head
    dim and stride.
    """
    units: tl.constexpr = D // STRIDE
    number = at + tl.arange(0, BU)[:, None]
    unit = number % (n * units)
    t = (number // (n * units)).to(tl.int64)
    x = t * row_stride + (first + unit // units) * head_stride.to(tl.int64) + unit % units
    flat = ((rank.to(tl.int64) * rows + t) * slot + offset) * units + unit
    return x, flat, t, unit % units, (t < rows) & (tl.arange(0, STRIDE)[None, :] >= 0)


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
def send(x_ptr, flat_ptr, cos_ptr, sin_ptr, tile, rows, rank, offset, n, copies, slot, row_stride, head_stride,
         ROTARY: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
         BU: tl.constexpr):  # fmt: skip
    """A tile of one tensor to one rank's part of the buffer."""
    x, flat, t, column, here = places(
        tile * BU, rows, rank, offset, n, slot, row_stride, head_stride, rank * n // copies, D, STRIDE, BU
    )
    value = tl.load(x_ptr + numbers(x, STRIDE), mask=here, other=0.0)
    if ROTARY:
        turns = here & (column < ROTARY // STRIDE)
        other = tl.load(x_ptr + numbers(x + away(column, ROTARY, STRIDE), STRIDE), mask=turns, other=0.0).to(WIDE)
        value = turn(value.to(WIDE), other, cos_ptr, sin_ptr, t, column, turns, ROTARY, BACK, STRIDE)
    tl.store(flat_ptr + numbers(flat, STRIDE), value.to(flat_ptr.dtype.element_ty), mask=here)


@triton.jit
def collect(x_ptr, flat_ptr, cos_ptr, sin_ptr, tile, rows, group, offset, n, copies, slot, row_stride, head_stride,
            ROTARY: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
            BU: tl.constexpr):  # fmt: skip
    """The adjoint: a tile of the heads that `copies` ranks have had, summed over them."""
    total, others = tl.zeros([BU, STRIDE], WIDE), tl.zeros([BU, STRIDE], WIDE)
    for copy in range(copies):
        _, flat, _, column, here = places(
            tile * BU, rows, group * copies + copy, offset, n, slot, row_stride, head_stride, group * n,
            D, STRIDE, BU,
        )  # fmt: skip
        total += tl.load(flat_ptr + numbers(flat, STRIDE), mask=here, other=0.0).to(WIDE)
        if ROTARY:
            other, turns = flat + away(column, ROTARY, STRIDE), here & (column < ROTARY // STRIDE)
            others += tl.load(flat_ptr + numbers(other, STRIDE), mask=turns, other=0.0).to(WIDE)
    x, _, t, column, here = places(
        tile * BU, rows, group, offset, n, slot, row_stride, head_stride, group * n, D, STRIDE, BU
    )
    if ROTARY:
        turns = here & (column < ROTARY // STRIDE)
        total = turn(total, others, cos_ptr, sin_ptr, t, column, turns, ROTARY, BACK, STRIDE)
    tl.store(x_ptr + numbers(x, STRIDE), total.to(x_ptr.dtype.element_ty), mask=here)


@triton.jit
def tiles(rows, n, D: tl.constexpr, STRIDE: tl.constexpr, BU: tl.constexpr):
    """How many tiles a tensor has for a rank. 32 bits, which divide faster, count all units of 8 elements."""
    if STRIDE == 1:
        return tl.cdiv(rows.to(tl.int64) * n * D, BU)
    return tl.cdiv(rows * n * (D // STRIDE), BU)


@triton.jit(do_not_specialize=RUNTIME)
def pack_heads(
    x0, x1, x2, flat, cos, sin, rows, slot, row0, head0, row1, head1, row2, head2, n0, n1, n2, copies0, copies1,
    copies2, ROTARY: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    BU: tl.constexpr,
):  # fmt: skip
    """One program a tile and rank: first the tiles of one tensor, then those of the next. The first two are rotated, if
    any are.

    Example: q = ((0, 1), (2, 3)), D = 1, no k and v, 2 ranks -> flat = (0, 2, 1, 3).
    """
    rank = tl.program_id(1)
    first, second = tiles(rows, n0, D, STRIDE, BU), tiles(rows, n1, D, STRIDE, BU)
    tile = tl.program_id(0) + first * 0  # as wide as `first`
    if tile < first:
        send(x0, flat, cos, sin, tile, rows, rank, 0, n0, copies0, slot, row0, head0,
             ROTARY, BACK, WIDE, D, STRIDE, BU)  # fmt: skip
    elif tile < first + second:
        send(x1, flat, cos, sin, tile - first, rows, rank, n0, n1, copies1, slot, row1, head1,
             ROTARY, BACK, WIDE, D, STRIDE, BU)  # fmt: skip
    else:
        send(x2, flat, cos, sin, tile - first - second, rows, rank, n0 + n1, n2, copies2, slot, row2, head2,
             0, BACK, WIDE, D, STRIDE, BU)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def unpack_heads(
    x0, x1, x2, flat, cos, sin, rows, slot, row0, head0, row1, head1, row2, head2, n0, n1, n2, copies0, copies1,
    copies2, ROTARY: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    BU: tl.constexpr,
):  # fmt: skip
    """The adjoint of pack_heads: what ranks have had twice is added up. A permutation where none has.

    Example: flat = (1, 2, 3, 4), one head for 2 ranks, D = 1 -> x = (1 + 3, 2 + 4).
    """
    group, ranks = tl.program_id(1), tl.num_programs(1)
    first, second = tiles(rows, n0, D, STRIDE, BU), tiles(rows, n1, D, STRIDE, BU)
    tile = tl.program_id(0) + first * 0
    if tile < first:
        if group * copies0 < ranks:
            collect(x0, flat, cos, sin, tile, rows, group, 0, n0, copies0, slot, row0, head0,
                    ROTARY, BACK, WIDE, D, STRIDE, BU)  # fmt: skip
    elif tile < first + second:
        if group * copies1 < ranks:
            collect(x1, flat, cos, sin, tile - first, rows, group, n0, n1, copies1, slot, row1, head1,
                    ROTARY, BACK, WIDE, D, STRIDE, BU)  # fmt: skip
    else:
        if group * copies2 < ranks:
            collect(x2, flat, cos, sin, tile - first - second, rows, group, n0 + n1, n2, copies2, slot, row2, head2,
                    0, BACK, WIDE, D, STRIDE, BU)  # fmt: skip


def _per_rank(xs: list[Tensor], ranks: int) -> list[int]:
    """How many heads of each tensor a rank gets."""
    return [max(1, x.shape[1] // ranks) for x in xs]


def _arguments(
    xs: list[Tensor], heads: list[int], flat: Tensor, ranks: int, rotation: Rotation | None
) -> tuple[tuple[int, int], list, dict[str, Any]]:
    """The grid, the arguments and the constants of a launch."""
    x, dim = xs[0], xs[0].shape[-1]
    cos, sin, back = (x, x, False) if rotation is None else rotation
    rotary = 0 if rotation is None else cos.shape[-1]
    stride, strides = launch.strides(*xs)
    unit = math.gcd(stride, dim, rotary // 2)  # what is turned with one another is whole units apart
    tile = ROTATED if rotary else UNITS
    copies = [max(1, ranks // x.shape[1]) for x in xs]
    missing = 3 - len(xs)
    arguments = [
        *xs, *[x] * missing, flat, cos.contiguous(), sin.contiguous(), x.shape[0], sum(heads),
        *(size * (stride // unit) for size in strides), *[0] * (2 * missing),
        *heads, *[0] * missing, *copies, *[1] * missing,
    ]  # fmt: skip
    grid = (sum(triton.cdiv(x.shape[0] * n * (dim // unit), tile) for n in heads), ranks)
    constants = {"ROTARY": rotary, "BACK": back, "WIDE": tl.float64 if flat.dtype == torch.float64 else tl.float32}
    return grid, arguments, {**constants, "D": dim, "STRIDE": unit, "BU": tile, "num_warps": 4}


def pack(xs: list[Tensor], ranks: int, rotation: Rotation | None = None) -> Tensor:
    """(P * T * slot, D): each rank's heads of up to three tensors of one dtype, the first two rotated."""
    xs = [launch.dense_rows(x) for x in xs]
    heads = _per_rank(xs, ranks)
    flat = xs[0].new_empty(ranks * xs[0].shape[0] * sum(heads), xs[0].shape[-1])
    grid, arguments, constants = _arguments(xs, heads, flat, ranks, rotation)
    if grid[0]:
        with torch.cuda.device_of(flat):
            pack_heads[grid](*arguments, **constants)
    return flat


def unpack(flat: Tensor, xs: list[Tensor], ranks: int, rotation: Rotation | None = None) -> None:
    """Write the tensors that `pack` has read, which may be strided but along D; sums are formed in fp32 or wider."""
    grid, arguments, constants = _arguments(xs, _per_rank(xs, ranks), flat.contiguous(), ranks, rotation)
    if grid[0]:
        with torch.cuda.device_of(flat):
            unpack_heads[grid](*arguments, **constants)
