"""pack and unpack: boxes of rows x heads between tensors and one flat buffer, each byte read and written once.

Shapes: tensors (rows, heads, D), strided but along D; the buffer (size, D); boxes int32 (boxes, 7) as `heads.Box`
has them: tensor, row, rows, head, heads, start, stride. On the way a tensor may be normed (RMSNorm over D, weight
(D,)) and rotated (rotary embeddings by tables (rows, D)); unpack is the adjoint of that. One launch a tensor: pointers
that are chosen inside a kernel do not compile for AMD (Triton 3.6.0).
MODE: 0 no rotation, 1 the halves of D form pairs (rotate-half), 2 neighbours do (interleaved).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch

RUNTIME = ["x_row", "x_head", "tensor", "boxes", "rows", "heads"]
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
    x_ptr, flat_ptr, boxes_ptr, cos_ptr, sin_ptr, w_ptr, eps, tensor, x_row, x_head,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program a box of this tensor and tile of its rows.

    Example: x = ((0, 1), (2, 3)), D = 1, boxes "head 1 of both rows, then head 0" -> flat = (1, 3, 0, 2).
    """
    box = boxes_ptr + tl.program_id(1) * 7
    row, rows = tl.load(box + 1), tl.load(box + 2)
    head, heads, start, stride = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5), tl.load(box + 6)
    if (tl.load(box) != tensor) | (tl.program_id(0) * BM >= rows):
        return
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    here = (r < rows)[:, None] & (d < D)[None, :]
    step = x_head.to(tl.int64) * UNIT
    x_ptr += (row + r)[:, None].to(tl.int64) * (x_row.to(tl.int64) * UNIT) + head * step
    to = flat_ptr + (start + r.to(tl.int64) * stride)[:, None] * D + d[None, :]
    for h in range(heads):
        x = tl.load(x_ptr + h * step + d[None, :], mask=here, other=0.0)
        if MODE > 0 or NORM:
            y, scale = x.to(tl.float32), 1.0
            if NORM:
                scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / D + eps)[:, None]
                y = y * scale * tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            if MODE > 0:
                p, sign = partner(d, D, MODE)
                z = tl.load(x_ptr + h * step + p[None, :], mask=here, other=0.0).to(tl.float32)
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
    flat_ptr, boxes_ptr, y_ptr, x_ptr, dw_ptr, cos_ptr, sin_ptr, w_ptr, eps, tensor, boxes, rows, heads, x_row, x_head,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and head of a tensor (y, contiguous): the sum of what boxes hold of it.

    Rotation and norm are undone as gradients: y = J^T sum, where J is what pack_boxes does to x. Example: two boxes
    with (1, 2) and (3,), the second for row 1 again, D = 1 -> y = (1, 5).
    """
    h, first = tl.program_id(1), tl.program_id(0) * BM
    r = first + tl.arange(0, BM)
    d = tl.arange(0, DP)
    p, sign = partner(d, D, MODE)
    total = tl.zeros([BM, DP], WIDE)
    other = tl.zeros([BM, DP], WIDE)  # the same of each column's partner
    for i in range(boxes):
        box = boxes_ptr + i * 7
        row, count, head = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        mine = (tl.load(box) == tensor) & (h >= head) & (h < head + tl.load(box + 4))
        if mine & (row < first + BM) & (row + count > first):
            here = ((r >= row) & (r < row + count))[:, None] & (d < D)[None, :]
            at = flat_ptr + (tl.load(box + 5) + (r - row).to(tl.int64) * tl.load(box + 6) + h - head)[:, None] * D
            total += tl.load(at + d[None, :], mask=here, other=0.0).to(WIDE)
            if MODE > 0:
                other += tl.load(at + p[None, :], mask=here, other=0.0).to(WIDE)
    here = (r < rows)[:, None] & (d < D)[None, :]
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
        dw = dw_ptr + (h * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D + d
        tl.store(dw, tl.sum(total * unit, 0), mask=d < D)
        total = total * tl.load(w_ptr + d, mask=d < D, other=0.0).to(WIDE)[None, :]
        total = scale * (total - unit * (tl.sum(total * unit, 1) / D)[:, None])
    to = y_ptr + (r[:, None].to(tl.int64) * heads + h) * D + d[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=here)


def _options(dim: int, turned: bool, normed: bool, mode: int) -> dict[str, int]:
    sizes = {"D": dim, "DP": triton.next_power_of_2(dim), "BM": ROWS, "num_warps": 4}
    return sizes | {"MODE": mode if turned else 0, "NORM": normed}


def pack(
    xs: list[Tensor],
    boxes: Tensor,
    size: int,
    tables: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    mode: int = 1,
) -> Tensor:
    """(size, D) of the dtype of xs. The first two of xs are normed by `weights` and rotated by `tables`, if given."""
    dim, flat = xs[0].shape[-1], xs[0].new_empty(size, xs[0].shape[-1])
    cos, sin = tables or (flat, flat)
    with torch.cuda.device_of(flat):
        for i, x in enumerate(map(launch.dense_rows, xs)):
            unit, strides = launch.strides(x)
            turned, normed = tables is not None and i < 2, weights is not None and i < 2
            grid = (triton.cdiv(x.shape[0], ROWS), len(boxes))
            if all(grid):
                pack_boxes[grid](
                    x, flat, boxes, cos, sin, weights[i] if normed else flat, eps, i, *strides,
                    UNIT=unit, **_options(dim, turned, normed, mode),
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
    mode: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors (rows, heads, D) of the dtype of flat; the gradients of what was packed, if `xs` are given, and then
    those of `weights` too, in fp32."""
    flat, dim = flat.contiguous(), flat.shape[-1]
    ys = [flat.new_empty(t, h, dim) for t, h in zip(rows, heads, strict=True)]
    cos, sin = tables or (flat, flat)
    wide = tl.float64 if flat.dtype == torch.float64 else tl.float32
    dws: list[Tensor] = []
    with torch.cuda.device_of(flat):
        for i, y in enumerate(ys):
            x = y if xs is None else launch.dense_rows(xs[i])
            unit, strides = launch.strides(x)
            turned, normed = tables is not None and i < 2, weights is not None and i < 2
            grid = (triton.cdiv(y.shape[0], ROWS), y.shape[1])
            dw = flat.new_empty(*grid, dim, dtype=torch.float32) if normed else flat
            if all(grid):
                unpack_boxes[grid](
                    flat, boxes, y, x, dw, cos, sin, weights[i] if normed else flat, eps, i, len(boxes),
                    y.shape[0], y.shape[1], *strides,
                    UNIT=unit, WIDE=wide, **_options(dim, turned, normed, mode),
                )  # fmt: skip
            if normed:
                dws.append(dw.sum((0, 1)))
    return ys, dws
