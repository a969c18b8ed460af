"""Attention of packed tokens, forward: one program for each tile of rows and head.

Shapes: q (T, H, D), k (T_k, K, D), v (T_k, K, V), out (T, H, V), log-sum-exp (H, T) in fp32. Strides are counted in
units of UNIT elements. All of them are multiples of 8 in practice, and saying so in this way lets the compiler see
16-byte loads at D = 72 too, where a head stride of 72 elements passed as it is made every load 2 bytes wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.schedule import place, table_of
from triton_sp.kernels.tiles import (
    dot_into,
    dot_rows,
    extent_keys,
    load_split,
    masked,
    reach,
    reach_in,
    soft,
    store_split,
)


@triton.jit
def attend_block(
    acc0, acc1, top, total, q0, q1, lowest, highest, edge, first, k_ptr, v_ptr, k_row, v_row, keys, inner, outer,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BN: tl.constexpr, SOFTCAP: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax (`top` and `total`: maximum and sum of each row, base 2)."""
    key = tl.arange(0, BN)
    k0, k1 = load_split(k_ptr + first * k_row, key, k_row, keys - first, D, D0, D1)
    v0, v1 = load_split(v_ptr + first * v_row, key, v_row, keys - first, V, V0, V1)
    s = soft(dot_rows(q0, q1, k0, k1, D1), inner, SOFTCAP)
    s = masked(s, first + key, lowest, highest, float("-inf"), edge, BRANCH)
    new_top = tl.maximum(top, tl.max(s, 1) * outer)
    # A row that has seen no key yet has top = -inf, and -inf - -inf would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * outer - base[:, None])
    alpha = tl.exp2(top - base)
    total = total * alpha + tl.sum(p, 1)
    acc0 = acc0 * alpha[:, None]
    if V1 > 0:
        acc1 = acc1 * alpha[:, None]
    acc0, acc1 = dot_into(acc0, acc1, p, v0, v1, V1)
    return acc0, acc1, new_top, total


@triton.jit(do_not_specialize=launch.RUNTIME)
def attend_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, used_ptr, ranges_ptr, table_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    rows, keys, segments, heads, group, causal, left, right, inner, outer,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    UNIT: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """out = softmax(mask(q k^T scale)) v and its log-sum-exp, for rows [first, first + BM) of one segment and head.

    A row at position p (its number in the segment, shifted so that the last row meets the last key) sees the keys
    p - left .. p + right, or those of its range where ranges are given, and the sink of its head, if there are sinks: a
    key of no value, whose score is learned. Example: v = (1, 3 | 10), equal scores,
    segments of 2 and 1 -> out = (2, 2 | 10).
    """
    segment, start, length, first, head = place(table_ptr, cu_q_ptr, segments, rows, heads, causal, BM, True)
    if first >= length:
        return
    k_start, k_length = extent_keys(segment, cu_k_ptr, used_ptr, segments, keys)
    q_row, k_row = q_row.to(tl.int64) * UNIT, k_row.to(tl.int64) * UNIT
    v_row, out_row = v_row.to(tl.int64) * UNIT, out_row.to(tl.int64) * UNIT
    k_base = k_ptr + k_start * k_row + (head // group) * (k_head.to(tl.int64) * UNIT)
    v_base = v_ptr + k_start * v_row + (head // group) * (v_head.to(tl.int64) * UNIT)
    q_base = q_ptr + (start + first) * q_row + head * (q_head.to(tl.int64) * UNIT)
    out_base = out_ptr + (start + first) * out_row + head * (out_head.to(tl.int64) * UNIT)

    row = tl.arange(0, BM)  # from the tile's start, as are the addresses
    q0, q1 = load_split(q_base, row, q_row, length - first, D, D0, D1)
    if ranges_ptr is not None:
        lowest, highest, begin, full_begin, full_end, end = reach_in(
            ranges_ptr, rows, start + first, tl.minimum(BM, length - first) - 1, row, k_start, k_length, BN
        )
    else:
        shift = k_length - length
        lowest, highest, begin, full_begin, full_end, end = reach(
            first + row + shift, first + shift, tl.minimum(first + BM, length) - 1 + shift, left, right, k_length, BN
        )
    acc0 = tl.zeros([BM, V0], tl.float32)
    acc1 = tl.zeros([BM, V1 if V1 > 0 else 16], tl.float32)
    if sinks_ptr is not None:
        # The running softmax begins with the sink. The slack has none, as it has no key.
        top = tl.zeros([BM], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        total = tl.where(segment < segments, 1.0, tl.zeros([BM], tl.float32))
    else:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    for block in range(begin, end):
        edge = (block < full_begin) | (block >= full_end)
        acc0, acc1, top, total = attend_block(
            acc0, acc1, top, total, q0, q1, lowest, highest, edge, block * BN, k_base, v_base, k_row, v_row, k_length,
            inner, outer, D, D0, D1, V, V0, V1, BN, SOFTCAP, BRANCH,
        )  # fmt: skip

    scale = 1.0 / tl.where(total == 0.0, 1.0, total)  # the sum over no key is 0, and so is out
    store_split(out_base, row, out_row, length - first, acc0 * scale[:, None], acc1 * scale[:, None], V, V0, V1)
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_ptr + head.to(tl.int64) * rows + start + first + row, lse, mask=row < length - first)


def forward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out_THD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed tokens on the device of q, which may be strided in any way but along D.

    Args: as `triton_sp.varlen_attention`, and `out_THD`, a strided place to write to.

    Returns: out (T, H, V) in the dtype of q and the log-sum-exp (H, T) in fp32, -inf for a row without a key
        or a sink.

    Raises: UnsupportedKernelError for a head dim or dtype that no kernel exists for.
    """
    (rows, heads, dim), v_dim = q_THD.shape, v_TKD.shape[2]
    q, k, v = (launch.dense_rows(x) for x in (q_THD, k_TKD, v_TKD))
    out = torch.empty(rows, heads, v_dim, dtype=q.dtype, device=q.device) if out_THD is None else out_THD
    lse_HT = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    choice = launch.find_launch("forward", dim, v_dim, q.dtype, mask.longest)
    unit, strides = launch.strides(q, k, v, out)
    cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges = mask.tables
    segments = mask.cu_seqlens_q.numel() - 1
    inner, outer = launch.score_factors(softmax_scale, softcap)
    ranges = None if key_ranges is None else key_ranges.contiguous()
    table = table_of(mask, rows, k.shape[0], choice.rows)
    with torch.cuda.device_of(q):
        attend_forward[((rows // choice.rows + segments + 1) * heads,)](
            q, k, v, out, lse_HT, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, ranges, table, *strides,
            rows, k.shape[0], segments, heads, heads // k.shape[1], mask.ordered, mask.left, mask.right, inner, outer,
            **choice.parts, UNIT=unit, SOFTCAP=softcap > 0,
            BM=choice.rows, BN=choice.keys, BRANCH=choice.branch, **choice.options,
        )  # fmt: skip
    return out, lse_HT
