"""pack and unpack where heads are cut: boxes of rows x heads between tensors and one flat buffer.

Shapes: tensors (rows, heads, D), strided but along D; the buffer (size, D); boxes int32 (boxes, 7) as `heads.Box` has
them: tensor, row, rows, head, heads, start, stride. One launch a tensor: pointers that are chosen inside a kernel do
not compile for AMD (Triton 3.6.0).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch

RUNTIME = ["x_row", "x_head", "tensor", "boxes", "rows", "heads"]
ROWS = 16  # of a tile: at D = 128 in bf16 4 KiB, so that one warp has eight 16-byte loads in flight


@triton.jit(do_not_specialize=RUNTIME)
def pack_boxes(
    x_ptr, flat_ptr, boxes_ptr, tensor, x_row, x_head,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, STRIDE: tl.constexpr,
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
    step = x_head.to(tl.int64) * STRIDE
    x_ptr += (row + r)[:, None].to(tl.int64) * (x_row.to(tl.int64) * STRIDE) + head * step
    to = flat_ptr + (start + r.to(tl.int64) * stride)[:, None] * D + d[None, :]
    for h in range(heads):
        tl.store(to + h * D, tl.load(x_ptr + h * step + d[None, :], mask=here, other=0.0), mask=here)


@triton.jit(do_not_specialize=RUNTIME)
def unpack_boxes(
    flat_ptr, boxes_ptr, y_ptr, tensor, boxes, rows, x_row, x_head,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and head of a tensor: the sum of what boxes hold of it.

    Example: two boxes with (1, 2) and (3,), the second for row 1 again, D = 1 -> y = (1, 5).
    """
    h, first = tl.program_id(1), tl.program_id(0) * BM
    r = first + tl.arange(0, BM)
    d = tl.arange(0, DP)
    total = tl.zeros([BM, DP], WIDE)
    for i in range(boxes):
        box = boxes_ptr + i * 7
        row, count, head = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        mine = (tl.load(box) == tensor) & (h >= head) & (h < head + tl.load(box + 4))
        if mine & (row < first + BM) & (row + count > first):
            here = ((r >= row) & (r < row + count))[:, None] & (d < D)[None, :]
            at = flat_ptr + (tl.load(box + 5) + (r - row).to(tl.int64) * tl.load(box + 6) + h - head)[:, None] * D
            total += tl.load(at + d[None, :], mask=here, other=0.0).to(WIDE)
    here = (r < rows)[:, None] & (d < D)[None, :]
    to = y_ptr + r[:, None].to(tl.int64) * (x_row.to(tl.int64) * STRIDE) + h * (x_head.to(tl.int64) * STRIDE)
    tl.store(to + d[None, :], total.to(y_ptr.dtype.element_ty), mask=here)


def _sizes(dim: int) -> dict[str, int]:
    return {"D": dim, "DP": triton.next_power_of_2(dim), "BM": ROWS, "num_warps": 4}


def pack(xs: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    """(size, D) of the dtype of xs."""
    flat = xs[0].new_empty(size, xs[0].shape[-1])
    with torch.cuda.device_of(flat):
        for i, x in enumerate(map(launch.dense_rows, xs)):
            stride, strides = launch.strides(x)
            grid = (triton.cdiv(x.shape[0], ROWS), len(boxes))
            if all(grid):
                pack_boxes[grid](x, flat, boxes, i, *strides, STRIDE=stride, **_sizes(x.shape[-1]))
    return flat


def unpack(flat: Tensor, boxes: Tensor, ys: list[Tensor]) -> None:
    """Write tensors (rows, heads, D), strided but along D."""
    flat = flat.contiguous()
    wide = tl.float64 if flat.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(flat):
        for i, y in enumerate(ys):
            stride, strides = launch.strides(y)
            grid = (triton.cdiv(y.shape[0], ROWS), y.shape[1])
            if all(grid):
                unpack_boxes[grid](
                    flat, boxes, y, i, len(boxes), y.shape[0], *strides, STRIDE=stride, WIDE=wide, **_sizes(y.shape[2])
                )
