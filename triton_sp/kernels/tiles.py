"""What the attend kernels share: from a program to its segment, which blocks it visits, and tiles split along D.

A head dim is not rounded up to a power of two: it is cut in two parts, D0 + D1 (80 = 64 + 16, 72 = 64 + 16 with 8
columns masked), and every tile is a pair. Where D1 is 0 the second of the pair is not used and costs nothing.
`launch.split` says which parts a head dim has. q and k have D = D0 + D1, v and out have V = V0 + V1.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, cu_ptr, segments, total, BLOCK: tl.constexpr):
    """The segment that a tile lies in, found on the device. Returns (segment, its start, its length, first row).

    Segment i gets the tiles from cu[i] // BLOCK + i on. That is at least as many as it needs, so a grid of
    total // BLOCK + segments + 1 tiles covers any lengths, and a tile finds its segment by bisection. For lengths
    (3, 0, 5) and BLOCK = 4, cu = [0, 3, 3, 8]: segments start at tiles 0, 1, 2 and the slack at tile 5; tile 3 is
    rows 4..7 of segment 2, of which row 4 is real. Segment number `segments` is the slack, from cu[-1] to the end.
    """
    low, high = tile * 0, segments
    while low < high:
        middle = (low + high + 1) // 2
        found = tl.minimum(tl.maximum(tl.load(cu_ptr + middle).to(tl.int32), 0), total)  # as `extent` cuts it
        inside = found // BLOCK + middle <= tile
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    start, length = extent(low, cu_ptr, segments, total, True)
    # Below 0 only where the table decreases, or does not start at 0.
    return low, start, length, tl.maximum((tile - start // BLOCK - low) * BLOCK, 0)


@triton.jit
def extent(segment, cu_ptr, segments, total, SLACK: tl.constexpr):
    """Start and length of a segment. Malformed cu_seqlens cannot raise here, so they are cut to what can be read."""
    last = total if SLACK else 0
    start = tl.load(cu_ptr + segment).to(tl.int32)
    stop = tl.load(cu_ptr + segment + 1, mask=segment < segments, other=last).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), total)
    return start, tl.minimum(tl.maximum(stop, start), total) - start


@triton.jit
def extent_keys(segment, cu_ptr, used_ptr, segments, total):
    """Start and number of the keys that the rows of a segment see. The slack sees none."""
    start, length = extent(segment, cu_ptr, segments, total, False)
    length = tl.where(segment < segments, length, 0)
    if used_ptr is not None:
        used = tl.load(used_ptr + segment, mask=segment < segments, other=0).to(tl.int32)
        length = tl.minimum(length, tl.maximum(used, 0))
    return start, length


@triton.jit
def reach(x, x_first, x_last, behind, ahead, limit, BLOCK: tl.constexpr):
    """Which y in [0, limit) the x of a tile meet, where x meets y if x - behind <= y <= x + ahead.

    Returns the lowest and highest y for each x, the blocks [begin, end) of y that hold any such pair, and the blocks
    [full_begin, full_end) in which every pair of the tile is one, so that they need no mask. For x in [4, 7],
    behind = 100, ahead = 0, limit = 8, BLOCK = 2: blocks [0, 4), of which [0, 2), that is keys 0..3, are full.
    """
    low = tl.maximum(x_first - behind, 0)
    high = tl.minimum(x_last + ahead + 1, limit)
    begin = low // BLOCK
    end = tl.where(high > low, (high + BLOCK - 1) // BLOCK, begin)
    full_begin = (tl.maximum(x_last - behind, 0) + BLOCK - 1) // BLOCK
    full_end = tl.maximum(tl.minimum(x_first + ahead + 1, limit), 0) // BLOCK
    return x - behind, tl.minimum(x + ahead, limit - 1), begin, full_begin, full_end, end


@triton.jit
def reach_in(ranges_ptr, total, at, x_last, x, base, limit, BLOCK: tl.constexpr):
    """`reach` where the range of y that each x meets is given: (2, total), first and stop, none less than the one
    before. The tile's x begin at `at` in that table, the last of them `x_last` further; y is counted from `base`.

    For x with the y ranges [0, 3), [0, 3), [0, 3), [1, 5), base = 0, limit = 5 and BLOCK = 2: blocks [0, 3), of which
    [1, 1) are full: the last x does not meet y = 0, the first not y = 3.
    """
    real = x <= x_last
    low = tl.load(ranges_ptr + at + x, mask=real, other=0).to(tl.int32) - base
    high = tl.load(ranges_ptr + total + at + x, mask=real, other=0).to(tl.int32) - base
    first_low = tl.load(ranges_ptr + at).to(tl.int32) - base
    last_low = tl.load(ranges_ptr + at + x_last).to(tl.int32) - base
    first_high = tl.load(ranges_ptr + total + at).to(tl.int32) - base
    last_high = tl.load(ranges_ptr + total + at + x_last).to(tl.int32) - base
    # What is malformed, or of another segment, is cut to what can be read.
    begin = tl.minimum(tl.maximum(first_low, 0), limit) // BLOCK
    stop = tl.minimum(tl.maximum(last_high, 0), limit)
    end = tl.maximum((stop + BLOCK - 1) // BLOCK, begin)
    full_begin = (tl.maximum(last_low, 0) + BLOCK - 1) // BLOCK
    full_end = tl.minimum(tl.maximum(first_high, 0), limit) // BLOCK
    return low, tl.minimum(high, limit) - 1, begin, full_begin, full_end, end


@triton.jit
def masked(s, y, lowest, highest, other, edge, BRANCH: tl.constexpr):
    """s (x, y) where x meets y, else `other`.

    On Hopper a branch spares full blocks the work. Elsewhere matrix operands are held in registers, the branch keeps
    them there, and ptxas spills up to 16 KB a thread (sm_80, dk and dv): there every block is masked.
    """
    if BRANCH:
        if edge:
            s = tl.where((y[None, :] >= lowest[:, None]) & (y[None, :] <= highest[:, None]), s, other)
    else:
        s = tl.where((y[None, :] >= lowest[:, None]) & (y[None, :] <= highest[:, None]), s, other)
    return s


@triton.jit
def load_split(ptr, rows, stride, limit, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of (.., D) as two tiles, rows at or past `limit` as 0: NaN there must not reach a product.

    `ptr` is where the tile starts, reached with 64-bit offsets; inside a tile 32 bits do (see launch.dense_rows) and
    save the registers that make dk and dv fit at D = 128.
    """
    inside = (rows < limit)[:, None]
    cols = tl.arange(0, D0)
    if D0 > D:
        inside &= (cols < D)[None, :]
    x0 = tl.load(ptr + (rows[:, None] * stride.to(tl.int32) + cols[None, :]), mask=inside, other=0.0)
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)
        if D0 + D1 > D:
            inside &= (cols < D)[None, :]
        x1 = tl.load(ptr + (rows[:, None] * stride.to(tl.int32) + cols[None, :]), mask=inside, other=0.0)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def store_split(ptr, rows, stride, limit, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    cols = tl.arange(0, D0)
    inside = (rows < limit)[:, None]
    if D0 > D:
        inside &= (cols < D)[None, :]
    tl.store(ptr + (rows[:, None] * stride.to(tl.int32) + cols[None, :]), x0.to(ptr.dtype.element_ty), mask=inside)
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)
        ptrs = ptr + (rows[:, None] * stride.to(tl.int32) + cols[None, :])
        tl.store(ptrs, x1.to(ptr.dtype.element_ty), mask=inside & (cols < D)[None, :])


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """a @ b^T over the head dim: both parts into one accumulator."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def dot_into(acc0, acc1, p, b0, b1, D1: tl.constexpr):
    """acc + p @ b, part by part."""
    acc0 = tl.dot(p.to(b0.dtype), b0, acc0, input_precision="ieee")
    if D1 > 0:
        acc1 = tl.dot(p.to(b1.dtype), b1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def soft(s, inner, SOFTCAP: tl.constexpr):
    """The scores before the factor `outer`: themselves, or tanh of them with inner = -2 log2(e) scale / softcap."""
    if SOFTCAP:
        s = 2.0 / (1.0 + tl.exp2(s * inner)) - 1.0
    return s
