"""pack and unpack: boxes of rows x heads between up to three tensors and one flat buffer, each byte read and written once.

Shapes: tensors (rows, heads, D), strided but along D; the buffer (size, D); boxes int32 (boxes, 7) as `heads.Box`
has them: tensor, row, rows, head, heads, start, stride. On the way queries and keys (the first two tensors) may be
normed (RMSNorm over D, weights (D,)) and rotated (rotary embeddings by tables (rows, D)); unpack is the adjoint of that.
MODE: 0 no rotation, 1 the halves of D form pairs (rotate-half), 2 neighbours do (interleaved).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch

RUNTIME = [f"{name}{i}" for i in range(3) for name in ("row", "head", "rows", "heads")] + ["first", "boxes"]
ROWS = 16  # of a tile: at D = 128 in bf16 4 KiB, so that one warp has eight 16-byte loads in flight


@triton.jit
def partner(d, D: tl.constexpr, MODE: tl.constexpr):
    """The column that a column is rotated with, and the sign: rotated[d] = x[d] cos[d] + sign x[partner] sin[d].

    For D = 4: halves pair (0, 2), (1, 3), neighbours (0, 1), (2, 3); the first of a pair has sign -1.
    """
    if MODE == 1:
        return tl.where(d < D // 2, d + D // 2, d - D // 2), tl.where(d < D // 2, -1.0, 1.0)
    return d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)


@triton.jit(do_not_specialize=RUNTIME)
def pack_boxes(
    x0_ptr, x1_ptr, x2_ptr, flat_ptr, boxes_ptr, cos_ptr, sin_ptr, w0_ptr, w1_ptr, eps, first,
    row0, head0, row1, head1, row2, head2,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program a box and tile of its rows.

    Example: x = ((0, 1), (2, 3)), D = 1, boxes "head 1 of both rows, then head 0" -> flat = (1, 3, 0, 2).
    """
    box = boxes_ptr + tl.program_id(1) * 7
    tensor, row, rows = tl.load(box) - first, tl.load(box + 1), tl.load(box + 2)
    head, heads, start, stride = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5), tl.load(box + 6)
    if (tensor < 0) | (tensor > 2) | (tl.program_id(0) * BM >= rows):
        return
    x_ptr, x_row, x_head, w_ptr = x0_ptr, row0, head0, w0_ptr
    if tensor == 1:
        x_ptr, x_row, x_head, w_ptr = x1_ptr, row1, head1, w1_ptr
    if tensor == 2:
        x_ptr, x_row, x_head = x2_ptr, row2, head2
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    here = (r < rows)[:, None] & (d < D)[None, :]
    x_ptr += (row + r)[:, None].to(tl.int64) * (x_row.to(tl.int64) * UNIT) + head * (x_head.to(tl.int64) * UNIT)
    to = flat_ptr + (start + r.to(tl.int64) * stride)[:, None] * D + d[None, :]
    for h in range(heads):
        at = x_ptr + h * (x_head.to(tl.int64) * UNIT)
        x = tl.load(at + d[None, :], mask=here, other=0.0)
        if (MODE > 0 or NORM) and tensor < 2:
            y, scale = x.to(tl.float32), 1.0
            if NORM:
                scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / D + eps)[:, None]
                y = y * scale * tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            if MODE > 0:
                p, sign = partner(d, D, MODE)
                z = tl.load(at + p[None, :], mask=here, other=0.0).to(tl.float32)
                if NORM:
                    z = z * scale * tl.load(w_ptr + p, mask=d < D, other=0.0).to(tl.float32)[None, :]
                angle = (row + r)[:, None].to(tl.int64) * D + d[None, :]
                cos = tl.load(cos_ptr + angle, mask=here, other=0.0).to(tl.float32)
                sin = tl.load(sin_ptr + angle, mask=here, other=0.0).to(tl.float32)
                y = y * cos + sign[None, :] * z * sin
            x = y.to(flat_ptr.dtype.element_ty)
        tl.store(to + h * D, x, mask=here)


@triton.jit(do_not_specialize=RUNTIME)
def unpack_boxes(
    flat_ptr, boxes_ptr, y0_ptr, y1_ptr, y2_ptr, x0_ptr, x1_ptr, dw_ptr, cos_ptr, sin_ptr, w0_ptr, w1_ptr, eps,
    first, boxes, rows0, heads0, rows1, heads1, rows2, heads2, row0, head0, row1, head1,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and head of a tensor (y, contiguous): the sum of what boxes hold of it.

    Rotation and norm are undone as gradients: y = J^T sum, where J is what pack_boxes does to x. Example: two boxes
    with (1, 2) and (3,), the second for row 1 again, D = 1 -> y = (1, 5).
    """
    tensor, h, y_ptr, x_ptr, w_ptr = 0, tl.program_id(1), y0_ptr, x0_ptr, w0_ptr
    rows, heads, x_row, x_head = rows0, heads0, row0, head0
    if h >= heads0 + heads1:
        tensor, h, y_ptr, rows, heads = 2, h - heads0 - heads1, y2_ptr, rows2, heads2
    elif h >= heads0:
        tensor, h, y_ptr, rows, heads = 1, h - heads0, y1_ptr, rows1, heads1
        x_ptr, x_row, x_head, w_ptr = x1_ptr, row1, head1, w1_ptr
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    p, sign = partner(d, D, MODE)
    total = tl.zeros([BM, DP], WIDE)
    other = tl.zeros([BM, DP], WIDE)  # the same of each column's partner
    for i in range(boxes):
        box = boxes_ptr + i * 7
        row, count, head = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        match = (tl.load(box) - first == tensor) & (h >= head) & (h < head + tl.load(box + 4))
        if match & (row < tl.program_id(0) * BM + BM) & (row + count > tl.program_id(0) * BM):
            here = ((r >= row) & (r < row + count))[:, None] & (d < D)[None, :]
            at = flat_ptr + (tl.load(box + 5) + (r - row).to(tl.int64) * tl.load(box + 6) + h - head)[:, None] * D
            total += tl.load(at + d[None, :], mask=here, other=0.0).to(WIDE)
            if MODE > 0:
                other += tl.load(at + p[None, :], mask=here, other=0.0).to(WIDE)
    here = (r < rows)[:, None] & (d < D)[None, :]
    if tensor < 2:
        if MODE > 0:
            # The adjoint of y[d] += sign[d] x[p] sin[d]: x's column d was the partner of p, under p's sign and angle.
            angle = r[:, None].to(tl.int64) * D
            cos = tl.load(cos_ptr + angle + d[None, :], mask=here, other=0.0).to(WIDE)
            sin = tl.load(sin_ptr + angle + p[None, :], mask=here, other=0.0).to(WIDE)
            total = total * cos - sign[None, :] * other * sin
        if NORM:
            at = x_ptr + r[:, None].to(tl.int64) * (x_row.to(tl.int64) * UNIT) + h * (x_head.to(tl.int64) * UNIT)
            x = tl.load(at + d[None, :], mask=here, other=0.0).to(WIDE)
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            unit = x * scale
            dw = dw_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D + d
            tl.store(dw, tl.sum(total * unit, 0), mask=d < D)
            total = total * tl.load(w_ptr + d, mask=d < D, other=0.0).to(WIDE)[None, :]
            total = scale * (total - unit * (tl.sum(total * unit, 1) / D)[:, None])
    to = y_ptr + (r[:, None].to(tl.int64) * heads + h) * D + d[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=here)


def _three(xs: list[Tensor], first: int) -> list[Tensor]:
    """Three tensors from `first` on; where there are fewer the last stands in, and no box names it."""
    return [xs[min(first + i, len(xs) - 1)] for i in range(3)]


def _options(dim: int) -> dict[str, int]:
    return {"D": dim, "DP": triton.next_power_of_2(dim), "BM": ROWS, "num_warps": 4}


def pack(
    xs: list[Tensor],
    boxes: Tensor,
    size: int,
    tables: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    mode: int = 0,
) -> Tensor:
    """(size, D) of the dtype of xs; see `packing.pack` and `packing.pack_rotated`."""
    dim = xs[0].shape[-1]
    xs = [launch.dense_rows(x) for x in xs]
    flat = xs[0].new_empty(size, dim)
    cos, sin = tables or (flat, flat)
    w_q, w_k = weights or (flat, flat)
    with torch.cuda.device_of(flat):
        for first in range(0, len(xs), 3):
            three = _three(xs, first)
            unit, strides = launch.strides(*three)
            tiles = triton.cdiv(max(x.shape[0] for x in three), ROWS)
            if tiles and len(boxes):
                pack_boxes[(tiles, len(boxes))](
                    *three, flat, boxes, cos, sin, w_q, w_k, eps, first, *strides,
                    UNIT=unit, MODE=mode if tables else 0, NORM=weights is not None, **_options(dim),
                )  # fmt: skip
    return flat


def unpack(
    flat: Tensor,
    boxes: Tensor,
    rows: list[int],
    heads: list[int],
    xs: list[Tensor] | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    mode: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors (rows, heads, D) of the dtype of flat, and with `weights` their gradients in fp32; see `packing.unpack`.

    With `tables` or `weights` flat is a gradient, and `xs` are the tensors that were packed.
    """
    flat, dim = flat.contiguous(), flat.shape[-1]
    ys = [flat.new_empty(t, h, dim) for t, h in zip(rows, heads, strict=True)]
    xs = [launch.dense_rows(x) for x in xs or ys]
    cos, sin = tables or (flat, flat)
    w_q, w_k = weights or (flat, flat)
    wide = tl.float64 if flat.dtype == torch.float64 else tl.float32
    dws: list[Tensor] = []
    with torch.cuda.device_of(flat):
        for first in range(0, len(ys), 3):
            three = _three(ys, first)
            counts = [(y.shape[0], y.shape[1]) for y in ys[first : first + 3]]
            counts += [(0, 0)] * (3 - len(counts))
            unit, strides = launch.strides(*_three(xs, first)[:2])
            grid = (triton.cdiv(max(t for t, _ in counts), ROWS), sum(h for _, h in counts))
            dw = flat.new_zeros(grid[1], grid[0], dim, dtype=torch.float32) if weights else flat
            if grid[0]:
                unpack_boxes[grid](
                    flat, boxes, *three, *_three(xs, first)[:2], dw, cos, sin, w_q, w_k, eps, first, len(boxes),
                    *(count for pair in counts for count in pair), *strides,
                    UNIT=unit, MODE=mode if tables else 0, NORM=weights is not None, WIDE=wide, **_options(dim),
                )  # fmt: skip
            if weights:
                dws = [part.sum((0, 1)) for part in dw[: sum(heads[:2])].split(heads[:2])]
    return ys, dws
