"""Attention of packed tokens, backward: two kernels, each the only writer of what it writes.

`attend_dq` runs over rows and gives dq and the statistics of each row; `attend_dkv` runs over keys and gives dk and dv,
summing over the query heads of its key head in a fixed order. No atomics: gradients are equal bit for bit from run to
run. The price is computing the scores twice (7 matrix products, where one kernel with atomics for dq needs 5).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.mask import Grads, Mask, States
from triton_sp.kernels.schedule import heads_each, place, row_ranges_of, table_of
from triton_sp.kernels.sinks import sink_gradient
from triton_sp.kernels.tiles import (
    dot_into,
    dot_rows,
    extent,
    extent_keys,
    load_split,
    masked,
    reach,
    reach_in,
    soft,
    store_split,
)


@triton.jit(do_not_specialize=launch.RUNTIME)
def attend_dq(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, dq_ptr, stats_ptr, delta_ptr,
    cu_q_ptr, cu_k_ptr, used_ptr, ranges_ptr, table_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, dout_row, dout_head, dq_row, dq_head,
    rows, keys, segments, heads, group, causal, left, right, inner, outer, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    UNIT: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BRANCH: tl.constexpr,
    SLOT: tl.constexpr,
):  # fmt: skip
    """dq = ds k of the rows [first, first + BM) of one segment and head, where ds = p (dout v^T - delta).

    Writes what `attend_dkv` needs of each row: lse2, the log-sum-exp in base 2 (+inf for a row without a key, so that
    its probabilities come out as 0), and delta = rowsum(dout * out) - dlse, since d lse / d s = p too.
    """
    segment, start, length, first, head = place(table_ptr, cu_q_ptr, segments, rows, heads, causal, BM, True)
    if first >= length:
        return
    k_start, k_length = extent_keys(segment, cu_k_ptr, used_ptr, segments, keys)
    q_row, k_row, v_row = q_row.to(tl.int64) * UNIT, k_row.to(tl.int64) * UNIT, v_row.to(tl.int64) * UNIT
    dq_row, out_row, dout_row = dq_row.to(tl.int64) * UNIT, out_row.to(tl.int64) * UNIT, dout_row.to(tl.int64) * UNIT
    k_base = k_ptr + k_start * k_row + (head // group) * (k_head.to(tl.int64) * UNIT)
    v_base = v_ptr + k_start * v_row + (head // group) * (v_head.to(tl.int64) * UNIT)
    q_base = q_ptr + (start + first) * q_row + head * (q_head.to(tl.int64) * UNIT)
    out_base = out_ptr + (start + first) * out_row + head * (out_head.to(tl.int64) * UNIT)
    dout_base = dout_ptr + (start + first) * dout_row + head * (dout_head.to(tl.int64) * UNIT)
    dq_base = dq_ptr + (start + first) * dq_row + head * (dq_head.to(tl.int64) * UNIT)

    row = tl.arange(0, BM)  # from the tile's start, as are the addresses
    per_row = head.to(tl.int64) * rows + start + first + row
    out0, out1 = load_split(out_base, row, out_row, length - first, V, V0, V1)
    dout0, dout1 = load_split(dout_base, row, dout_row, length - first, V, V0, V1)
    delta = tl.sum(out0.to(tl.float32) * dout0.to(tl.float32), 1)
    if V1 > 0:
        delta += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + per_row, mask=row < length - first, other=0.0)
    lse2 = tl.load(lse_ptr + per_row, mask=row < length - first, other=0.0) * 1.4426950408889634
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    stats_ptr = stats_of(stats_ptr, head, segment, start, segments, rows, SLOT) + 2 * (first + row)
    tl.store(stats_ptr, lse2, mask=row < length - first)
    tl.store(stats_ptr + 1, delta, mask=row < length - first)
    if delta_ptr is not None:
        tl.store(delta_ptr + per_row, delta, mask=row < length - first)

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
    dq0 = tl.zeros([BM, D0], tl.float32)
    dq1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    for block in range(begin, end):
        key = tl.arange(0, BN)
        k0, k1 = load_split(k_base + block * BN * k_row, key, k_row, k_length - block * BN, D, D0, D1)
        v0, v1 = load_split(v_base + block * BN * v_row, key, v_row, k_length - block * BN, V, V0, V1)
        s = soft(dot_rows(q0, q1, k0, k1, D1), inner, SOFTCAP)
        edge = (block < full_begin) | (block >= full_end)
        p = masked(tl.exp2(s * outer - lse2[:, None]), block * BN + key, lowest, highest, 0.0, edge, BRANCH)
        ds = p * (dot_rows(dout0, dout1, v0, v1, V1) - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - s * s
        dq0, dq1 = dot_into(dq0, dq1, ds, k0, k1, D1)
    store_split(dq_base, row, dq_row, length - first, dq0 * scale, dq1 * scale, D, D0, D1)


@triton.jit
def stats_of(stats_ptr, head, segment, start, segments, rows, SLOT: tl.constexpr):
    """Where the statistics of a segment's rows are: (lse2, delta) of one row after the other.

    Segments begin at multiples of SLOT rows, see `locate`, so that `attend_dkv` reads 16 bytes at a time.
    """
    slots = rows // SLOT + segments + 1
    return stats_ptr + (head.to(tl.int64) * slots + start // SLOT + segment) * (2 * SLOT)


@triton.jit
def dkv_block(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, lowest, highest, edge, first, q_ptr, dout_ptr, stats_ptr,
    q_row, dout_row, rows, inner, outer,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BM: tl.constexpr, SOFTCAP: tl.constexpr, BRANCH: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk += ds^T q and dv += p^T dout over one block of rows.

    The scores are computed transposed, k q^T: a transposed accumulator as an operand is wrong code in Triton 3.4-3.7.
    """
    row = tl.arange(0, BM)
    q0, q1 = load_split(q_ptr + first * q_row, row, q_row, rows - first, D, D0, D1)
    dout0, dout1 = load_split(dout_ptr + first * dout_row, row, dout_row, rows - first, V, V0, V1)
    # Read without a mask, as 32-bit offsets and before the products: each of these decided between spilling and not.
    # So what was read past the segment's end can be NaN, and ds is masked as p is.
    at = 2 * first + 4 * tl.arange(0, BM // 2)[:, None] + tl.arange(0, 4)[None, :]
    lse2, delta = tl.split(tl.reshape(tl.load(stats_ptr + at), [BM, 2]))
    s = soft(dot_rows(k0, k1, q0, q1, D1), inner, SOFTCAP)
    p = masked(tl.exp2(s * outer - lse2[None, :]), first + row, lowest, highest, 0.0, edge, BRANCH)
    if DV:
        dv0, dv1 = dot_into(dv0, dv1, p, dout0, dout1, V1)
    if DK:
        ds = p * (dot_rows(v0, v1, dout0, dout1, V1) - delta[None, :])
        if SOFTCAP:
            ds *= 1.0 - s * s
        ds = masked(ds, first + row, lowest, highest, 0.0, edge, BRANCH)
        dk0, dk1 = dot_into(dk0, dk1, ds, q0, q1, D1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=launch.RUNTIME)
def attend_dkv(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, stats_ptr, cu_q_ptr, cu_k_ptr, used_ptr,
    ranges_ptr, table_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, dk_row, dk_head, dv_row, dv_head,
    rows, keys, segments, heads, group, each, causal, left, right, inner, outer, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    UNIT: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BRANCH: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk (if DK) and dv (if DV) of the keys [first, first + BN) of one segment and key head, summed over `each` of its
    query heads: all of the group, or one, where `add_heads` sums afterwards. `heads` counts these parts.
    """
    segment, k_start, k_extent, first, part = place(table_ptr, cu_k_ptr, segments, keys, heads, causal, BN, False)
    if first >= k_extent:
        return
    _, k_length = extent_keys(segment, cu_k_ptr, used_ptr, segments, keys)
    start, length = extent(segment, cu_q_ptr, segments, rows, False)
    length = tl.where(segment < segments, length, 0)
    q_row, k_row, v_row = q_row.to(tl.int64) * UNIT, k_row.to(tl.int64) * UNIT, v_row.to(tl.int64) * UNIT
    dout_row, dk_row, dv_row = dout_row.to(tl.int64) * UNIT, dk_row.to(tl.int64) * UNIT, dv_row.to(tl.int64) * UNIT
    k_base = k_ptr + (k_start + first) * k_row + (part * each // group) * (k_head.to(tl.int64) * UNIT)
    v_base = v_ptr + (k_start + first) * v_row + (part * each // group) * (v_head.to(tl.int64) * UNIT)
    dk_base = dk_ptr + (k_start + first) * dk_row + part * (dk_head.to(tl.int64) * UNIT)
    dv_base = dv_ptr + (k_start + first) * dv_row + part * (dv_head.to(tl.int64) * UNIT)

    key = tl.arange(0, BN)  # from the tile's start, as are the addresses
    k0, k1 = load_split(k_base, key, k_row, k_length - first, D, D0, D1)
    v0, v1 = load_split(v_base, key, v_row, k_length - first, V, V0, V1)
    if ranges_ptr is not None:  # here of the rows that see each key
        lowest, highest, begin, full_begin, full_end, end = reach_in(
            ranges_ptr, keys, k_start + first, tl.maximum(tl.minimum(BN, k_length - first), 1) - 1, key, start, length,
            BM,
        )  # fmt: skip
    else:
        shift = k_length - length
        lowest, highest, begin, full_begin, full_end, end = reach(
            first + key - shift, first - shift, tl.minimum(first + BN, k_length) - 1 - shift, right, left, length, BM
        )
    end = tl.where(first < k_length, end, begin)  # no row sees the keys that seqused_k leaves out
    dk0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    dv0 = tl.zeros([BN, V0], tl.float32)
    dv1 = tl.zeros([BN, V1 if V1 > 0 else 16], tl.float32)
    for head in range(part * each, (part + 1) * each):
        q_base = q_ptr + start * q_row + head * (q_head.to(tl.int64) * UNIT)
        dout_base = dout_ptr + start * dout_row + head * (dout_head.to(tl.int64) * UNIT)
        stats = stats_of(stats_ptr, tl.cast(head, tl.int32), segment, start, segments, rows, BM)
        for block in range(begin, end):
            edge = (block < full_begin) | (block >= full_end)
            dk0, dk1, dv0, dv1 = dkv_block(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, lowest, highest, edge, block * BM, q_base, dout_base,
                stats, q_row, dout_row, length, inner, outer,
                D, D0, D1, V, V0, V1, BM, SOFTCAP, BRANCH, DK, DV,
            )  # fmt: skip
    # The sums of keys at or past k_length are those of a key of zeros, not zero: they are set to 0 here.
    real = (key < k_length - first)[:, None]
    if DK:
        dk0, dk1 = tl.where(real, dk0 * scale, 0.0), tl.where(real, dk1 * scale, 0.0)
        store_split(dk_base, key, dk_row, k_extent - first, dk0, dk1, D, D0, D1)
    if DV:
        dv0, dv1 = tl.where(real, dv0, 0.0), tl.where(real, dv1, 0.0)
        store_split(dv_base, key, dv_row, k_extent - first, dv0, dv1, V, V0, V1)


@triton.jit(do_not_specialize=launch.RUNTIME)
def add_heads(
    parts_ptr, out_ptr, out_row, out_head, rows, heads, group,
    D: tl.constexpr, DP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out (T, K, D) = the sum over the query heads of each key head of fp32 parts (T, K * group, D), in their order.

    Example: parts (1, 2, 3, 4) of one row, D = 1, group = 2 -> out = (3, 7).
    """
    row, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    col = tl.arange(0, DP)[None, :]
    here = (row < rows)[:, None] & (col < D)
    at = parts_ptr + (row[:, None].to(tl.int64) * (heads * group) + head * group) * D + col
    total = tl.zeros([BM, DP], tl.float32)
    for i in range(group):
        total += tl.load(at + i * D, mask=here, other=0.0)
    to = row[:, None].to(tl.int64) * (out_row.to(tl.int64) * UNIT) + head * (out_head.to(tl.int64) * UNIT) + col
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=here)


def sum_heads(parts: Tensor, out: Tensor, group: int) -> None:
    """Launches `add_heads`."""
    (unit, strides), (keys, k_heads, dim) = launch.strides(out), out.shape
    add_heads[(triton.cdiv(keys, 16), k_heads)](
        parts, out, *strides, keys, k_heads, group,
        D=dim, DP=triton.next_power_of_2(dim), UNIT=unit, BM=16, num_warps=4,
    )  # fmt: skip


def backward(
    dout_THD: Tensor,
    dlse_HT: Tensor | None,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    grads: States | None = None,
) -> Grads:
    """Gradients of `attend.forward`: dq (T, H, D), dk (T_k, K, D) and dv (T_k, K, V), in the dtypes of q, k and v, and
    that of the sinks (H,) in fp32, if there are any.

    Args: `dout_THD` and `dlse_HT`, the gradients of both results (None: the log-sum-exp was not used), then the
    arguments and results of the forward; `grads`, strided places to write dq, dk and dv to. Any strides are read; a
    `dout` that is not contiguous along D is copied.
    """
    (rows, heads, dim), v_dim = q_THD.shape, v_TKD.shape[2]
    q, k, v, out, dout = (launch.dense_rows(x) for x in (q_THD, k_TKD, v_TKD, out_THD, dout_THD))
    dq, dk, dv = grads or (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dlse_HT = None if dlse_HT is None else dlse_HT.contiguous()
    cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges = mask.tables
    segments = mask.cu_seqlens_q.numel() - 1
    inner, outer = launch.score_factors(softmax_scale, softcap)
    keys, k_heads, group = k.shape[0], k.shape[1], heads // k.shape[1]
    reaches = (mask.ordered, mask.left, mask.right, inner, outer, softmax_scale)
    key_ranges = None if key_ranges is None else key_ranges.contiguous()
    choice, dkv = (launch.find_launch(kernel, dim, v_dim, q.dtype, mask.longest) for kernel in ("dq", "dkv"))
    slots = rows // dkv.rows + segments + 1
    delta_HT = None if sinks is None else torch.empty_like(lse_HT)
    stats = torch.empty(heads, slots, dkv.rows, 2, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        unit, strides = launch.strides(q, k, v, out, dout, dq)
        attend_dq[((rows // choice.rows + segments + 1) * heads,)](
            q, k, v, out, dout, lse_HT, dlse_HT, dq, stats, delta_HT, cu_seqlens_q, cu_seqlens_k, seqused_k,
            key_ranges, table_of(mask, rows, keys, choice.rows), *strides, rows, keys, segments, heads, group, *reaches,
            **choice.parts, UNIT=unit, SOFTCAP=softcap > 0,
            BM=choice.rows, BN=choice.keys, BRANCH=choice.branch, SLOT=dkv.rows, **choice.options,
        )  # fmt: skip
        each = heads_each(keys // dkv.keys, k_heads, group, q.device)
        parts = [
            x if each == group else torch.empty(keys, heads, x.shape[2], dtype=torch.float32, device=x.device)
            for x in (dk, dv)
        ]
        unit, strides = launch.strides(q, k, v, dout, *parts)
        # Both sums of a tile of keys do not fit the registers above 128: there each gets a launch (9 products, not 7).
        for wants_dk, wants_dv in ((True, False), (False, True)) if max(dim, v_dim) > 128 else ((True, True),):
            attend_dkv[((keys // dkv.keys + segments + 1) * (heads // each),)](
                q, k, v, dout, *parts, stats, cu_seqlens_q, cu_seqlens_k, seqused_k, row_ranges_of(mask, keys),
                table_of(mask, rows, keys, dkv.keys, of_keys=True), *strides,
                rows, keys, segments, heads // each, group, each, *reaches,
                **dkv.parts, UNIT=unit, SOFTCAP=softcap > 0,
                BM=dkv.rows, BN=dkv.keys, BRANCH=dkv.branch, DK=wants_dk, DV=wants_dv, **dkv.options,
            )  # fmt: skip
        if each != group:
            sum_heads(parts[0], dk, group)
            sum_heads(parts[1], dv, group)
    return Grads(dq, dk, dv, None if sinks is None or delta_HT is None else sink_gradient(sinks, lse_HT, delta_HT))
