"""What the backward for Hopper (backward.py) does with tiles: asks the TMA for them, clears, multiplies and adds them.

A tile is a pair along the head dim, as in kernels/tiles.py; products are issued here and waited for elsewhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from triton_sp.kernels.hopper.tiles import clear_rows


@gluon.jit
def matrix(tile, stage, ROWS: gl.constexpr, COLS: gl.constexpr):
    return tile.index(stage).reshape([ROWS, COLS])


@gluon.jit
def fetch(desc0, desc1, tile0, tile1, full, stage, row, head, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    """Asks the TMA for a tile of rows; `full` is complete when all of it is there."""
    mbarrier.expect(full, ROWS * (D0 + D1) * 2)
    tma.async_copy_global_to_shared(desc0, [row, head, 0], full, tile0.index(stage))
    if D1 > 0:
        tma.async_copy_global_to_shared(desc1, [row, head, D0], full, tile1.index(stage))


@gluon.jit
def fetch_if(
    wanted, desc0, desc1, tile0, tile1, full, stage, row, head,
    ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    if wanted:
        fetch(desc0, desc1, tile0, tile1, full, stage, row, head, ROWS, D0, D1)


@gluon.jit
def clear_pair(tile0, tile1, valid, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    clear_rows(tile0, valid, ROWS, D0, 8)
    if D1 > 0:
        clear_rows(tile1, valid, ROWS, D1, 8)


@gluon.jit
def add_product(a0, a1, b0, b1, s, D1: gl.constexpr):
    """Issues s + a b^T over both parts of the head dim, and does not wait."""
    s = warpgroup_mma(a0, b0.permute((1, 0)), s, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(a1, b1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def add_rows(ptr, x, limit, first_col, D: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """Adds the rows of x below `limit` to rows of D numbers in fp32 in global memory."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    col = first_col + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
    inside = (row < limit)[:, None] & (col < D)[None, :]
    gl.atomic_add(ptr + (row[:, None] * D + col[None, :]), x, mask=inside, sem="relaxed")


@gluon.jit
def add_pair(
    ptr, x0, x1, limit, D: gl.constexpr, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    LAYOUT0: gl.constexpr, LAYOUT1: gl.constexpr,
):  # fmt: skip
    add_rows(ptr, x0, limit, 0, D, ROWS, D0, LAYOUT0)
    if D1 > 0:
        add_rows(ptr, x1, limit, D0, D, ROWS, D1, LAYOUT1)
