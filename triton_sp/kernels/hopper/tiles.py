"""What the Gluon kernel (attend.py) does with tiles: in shared memory, as products, and out of them.

A tile is a pair along D, as in tiles.py. In shared memory it is (rows, 1, columns), as the TMA reads one head, and
`part` shows it as a matrix. Products are issued here and waited for elsewhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def ring(bars, first, block, STAGES: gl.constexpr):
    """The barrier of a block in the ring, which starts at `first` of `bars`, and the parity of its turn."""
    return bars.index(first + block % STAGES), (block // STAGES) & 1


@gluon.jit
def part(tile, stage, ROWS: gl.constexpr, COLS: gl.constexpr):
    return tile.index(stage).reshape([ROWS, COLS])


@gluon.jit
def clear_rows(tile, valid, ROWS: gl.constexpr, COLS: gl.constexpr, WARPS: gl.constexpr):
    """Rows of a tile in shared memory at or past `valid` as 0: they belong to a neighbour, and 0 * NaN is NaN."""
    WIDE: gl.constexpr = COLS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [WARPS, 1], [1, 0])
    STEP: gl.constexpr = 32  # few rows at a time: the warps that load have few registers
    row = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    for i in gl.static_range(ROWS // STEP):
        if (i + 1) * STEP > valid:
            rows = tile.slice(i * STEP, STEP, 0)
            x = rows.load(layout)
            rows.store(gl.where((i * STEP + row < valid)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def scores(q0, q1, k0, k1, stage, zeros, BN: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    """Issues q k^T of a block, and does not wait."""
    s = warpgroup_mma(q0, part(k0, stage, BN, D0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, part(k1, stage, BN, D1).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def weigh(acc0, acc1, p0, p1, v0, v1, stage, BN: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    """Issues acc + p v of a block, and does not wait."""
    acc0 = warpgroup_mma(p0, part(v0, stage, BN, D0), acc0, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(p1, part(v1, stage, BN, D1), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def settle(acc0, acc1, D1: gl.constexpr):
    """Waits for `weigh`."""
    if D1 > 0:
        acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    else:
        acc0 = warpgroup_mma_wait(0, deps=[acc0])
    return acc0, acc1


@gluon.jit
def stretch(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def soften(s, top, total, highest, lowest, first, outer, BN: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """A block of scores into the running maximum and sum. Returns the weights as an operand, and the new state."""
    if first + BN - 1 > lowest:  # the last key that every row sees
        key = first + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        s = gl.where(key[None, :] <= highest[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * outer)
    # A row that has seen no key yet has top = -inf, and -inf - -inf would be NaN.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(s * outer - base[:, None])
    alpha = gl.exp2(top - base)
    return p.to(DTYPE), alpha, new_top, total * alpha + gl.sum(p, 1)


@gluon.jit
def write(ptr, x, limit, stride, first_col, D: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Rows below `limit` of x to global memory, 16 bytes a thread."""
    WIDE: gl.constexpr = COLS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    col = first_col + gl.arange(0, COLS, gl.SliceLayout(0, layout))
    ptrs = ptr + (row[:, None] * stride.to(gl.int32) + col[None, :])
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    gl.store(ptrs, x, mask=(row < limit)[:, None] & (col < D)[None, :])
