"""splice: rows of two matrices in one, each byte read and written once, forward and backward.

Shapes: text (S, C) and visual (V, C), strided but along C; index (T,), int32 or int64: the visual row of a token, or
-1 - s for row s of the text. No row has two tokens, so that the backward is the same kind of copy with the index turned
round, and nothing is added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 512  # of a tile: 8 KiB in bf16; 4 x 1024 spills 8 bytes on sm_80 with Triton 3.9


@triton.jit(do_not_specialize=["tokens", "texts", "visuals", "text_row", "visual_row"])
def splice_rows(
    text_ptr, visual_ptr, index_ptr, out_ptr, tokens, texts, visuals, text_row, visual_row,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """out[t] = visual[index[t]], or text[-1 - index[t]] where that is a row of text, else 0.

    Example, C = 1: text (1, 2, 3), visual (8, 9), index (-1, 1, -3, -4) -> (1, 9, 3, 0).
    """
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    index = tl.load(index_ptr + t, mask=t < tokens, other=-1).to(tl.int64)[:, None]
    here = (t < tokens)[:, None] & (c < C)
    at = visual_ptr + index * (visual_row.to(tl.int64) * UNIT) + c
    row = tl.load(at, mask=here & (index >= 0) & (index < visuals), other=0.0)
    if TEXT:
        at = text_ptr + (-1 - index) * (text_row.to(tl.int64) * UNIT) + c
        row = tl.where(index < 0, tl.load(at, mask=here & (index < 0) & (-1 - index < texts), other=0.0), row)
    tl.store(out_ptr + t[:, None] * C + c, row, mask=here)


def splice(text: Tensor | None, visual: Tensor, index: Tensor) -> Tensor:
    """(T, C): rows of visual, and of text; 0 where the index names a row that there is not."""
    text, visual = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (text, visual))
    first = visual if text is None else text
    tokens, columns = len(index), visual.shape[1]
    out = visual.new_empty(tokens, columns)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(columns, block))
    if all(grid):
        unit = 8 if first.stride(0) % 8 == visual.stride(0) % 8 == 0 else 1
        with torch.cuda.device_of(out):
            splice_rows[grid](
                first, visual, index, out, tokens, len(first), len(visual), first.stride(0) // unit,
                visual.stride(0) // unit,
                C=columns, BM=ROWS, BC=block, UNIT=unit, TEXT=text is not None, num_warps=4,
            )  # fmt: skip
    return out
