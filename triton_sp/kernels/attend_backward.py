"""Attention of packed tokens, backward: two kernels, each the only writer of what it writes.

`attend_dq` runs over rows and gives dq and delta = rowsum(dout * out); `attend_dkv` runs over keys and gives dk and dv,
summing over the query heads of its key head in a fixed order. No atomics: gradients are equal bit for bit from run to
run. The price is computing the scores twice (7 matrix products, where one kernel with atomics for dq needs 5).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.tiles import (
    dot_into,
    dot_rows,
    extent,
    extent_keys,
    load_split,
    locate,
    soft,
    store_split,
    visible_blocks,
)


@triton.jit
def dq_block(
    dq0, dq1, q0, q1, dout0, dout1, lse, delta, position, block, k_ptr, v_ptr, k_row, v_row, keys, left, right,
    inner, outer,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += ds k over one block of keys, where ds = p (dout v^T - delta)."""
    first = block * BN
    key = tl.arange(0, BN)
    k0, k1 = load_split(k_ptr + first * k_row, key, k_row, keys - first, D, D0, D1, MASKED)
    v0, v1 = load_split(v_ptr + first * v_row, key, v_row, keys - first, D, D0, D1, MASKED)
    s = soft(dot_rows(q0, q1, k0, k1, D1), inner, SOFTCAP)
    p = tl.exp2(s * outer - lse[:, None])
    ds = p * (dot_rows(dout0, dout1, v0, v1, D1) - delta[:, None])
    if SOFTCAP:
        ds *= 1.0 - s * s
    if MASKED:
        key += first
        seen = (key[None, :] >= position[:, None] - left) & (key[None, :] <= position[:, None] + right)
        ds = tl.where(seen & (key < keys)[None, :], ds, 0.0)
    return dot_into(dq0, dq1, ds, k0, k1, D1)


@triton.jit(do_not_specialize=launch.RUNTIME)
def attend_dq(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dlse_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, used_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, dout_row, dout_head, dq_row, dq_head,
    rows, keys, segments, group, left, right, inner, outer, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of the rows [first, first + BM) of one segment and head, and their delta. Tiles as in `attend_forward`."""
    head = tl.program_id(1)
    segment, start, length, first = locate(tl.program_id(0), cu_q_ptr, segments, rows, BM)
    if first >= length:
        return
    k_start, k_length = extent_keys(segment, cu_k_ptr, used_ptr, segments, keys)
    k_row, v_row = k_row.to(tl.int64) * UNIT, v_row.to(tl.int64) * UNIT
    q_row, dq_row = q_row.to(tl.int64) * UNIT, dq_row.to(tl.int64) * UNIT
    out_row, dout_row = out_row.to(tl.int64) * UNIT, dout_row.to(tl.int64) * UNIT
    k_head_ptr = k_ptr + k_start * k_row + (head // group) * (k_head.to(tl.int64) * UNIT)
    v_head_ptr = v_ptr + k_start * v_row + (head // group) * (v_head.to(tl.int64) * UNIT)

    row = first + tl.arange(0, BM)
    per_row = head.to(tl.int64) * rows + start + row
    out_base = out_ptr + start * out_row + head * (out_head.to(tl.int64) * UNIT)
    out0, out1 = load_split(out_base, row, out_row, length, D, D0, D1, True)
    dout_base = dout_ptr + start * dout_row + head * (dout_head.to(tl.int64) * UNIT)
    dout0, dout1 = load_split(dout_base, row, dout_row, length, D, D0, D1, True)
    delta = tl.sum(out0.to(tl.float32) * dout0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), 1)
    if dlse_ptr is not None:  # d lse / d s = p, so its gradient takes the place of -delta
        delta -= tl.load(dlse_ptr + per_row, mask=row < length, other=0.0)
    tl.store(delta_ptr + per_row, delta, mask=row < length)
    lse = tl.load(lse_ptr + per_row, mask=row < length, other=0.0) * 1.4426950408889634

    q_base = q_ptr + start * q_row + head * (q_head.to(tl.int64) * UNIT)
    q0, q1 = load_split(q_base, row, q_row, length, D, D0, D1, True)
    shift = k_length - length
    begin, full_begin, full_end, end = visible_blocks(
        first + shift, tl.minimum(first + BM, length) - 1 + shift, left, right, k_length, BN
    )
    dq0 = tl.zeros([BM, D0], tl.float32)
    dq1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    for block in range(full_begin, full_end):
        dq0, dq1 = dq_block(
            dq0, dq1, q0, q1, dout0, dout1, lse, delta, row + shift, block, k_head_ptr, v_head_ptr, k_row, v_row,
            k_length, left, right, inner, outer, D, D0, D1, BN, SOFTCAP, False,
        )  # fmt: skip
    for edge in range(begin, end - (full_end - full_begin)):
        block = tl.where(edge < full_begin, edge, edge + (full_end - full_begin))
        dq0, dq1 = dq_block(
            dq0, dq1, q0, q1, dout0, dout1, lse, delta, row + shift, block, k_head_ptr, v_head_ptr, k_row, v_row,
            k_length, left, right, inner, outer, D, D0, D1, BN, SOFTCAP, True,
        )  # fmt: skip
    dq_base = dq_ptr + start * dq_row + head * (dq_head.to(tl.int64) * UNIT)
    store_split(dq_base, row, dq_row, length, dq0 * scale, dq1 * scale, D, D0, D1)


@triton.jit
def dkv_block(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, position, block, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_row, dout_row, rows,
    left, right, inner, outer,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk += ds^T q and dv += p^T dout over one block of rows.

    The scores are computed transposed, k q^T: a transposed accumulator as an operand is wrong code in Triton 3.4-3.7.
    """
    first = block * BM
    row = tl.arange(0, BM)
    q0, q1 = load_split(q_ptr + first * q_row, row, q_row, rows - first, D, D0, D1, MASKED)
    dout0, dout1 = load_split(dout_ptr + first * dout_row, row, dout_row, rows - first, D, D0, D1, MASKED)
    row += first
    if MASKED:
        lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row < rows, other=0.0)
    else:
        lse = tl.load(lse_ptr + row)
        delta = tl.load(delta_ptr + row)
    s = soft(dot_rows(k0, k1, q0, q1, D1), inner, SOFTCAP)
    p = tl.exp2(s * outer - lse[None, :] * 1.4426950408889634)
    if MASKED:
        seen = (row[None, :] >= position[:, None] - right) & (row[None, :] <= position[:, None] + left)
        seen &= (row < rows)[None, :]
        p = tl.where(seen, p, 0.0)
    dv0, dv1 = dot_into(dv0, dv1, p, dout0, dout1, D1)
    ds = p * (dot_rows(v0, v1, dout0, dout1, D1) - delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - s * s
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    dk0, dk1 = dot_into(dk0, dk1, ds, q0, q1, D1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=launch.RUNTIME)
def attend_dkv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, used_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, dk_row, dk_head, dv_row, dv_head,
    rows, keys, segments, group, left, right, inner, outer, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys [first, first + BN) of one segment and key head. Keys that no row sees get 0."""
    k_head_number = tl.program_id(1)
    segment, k_start, k_extent, first = locate(tl.program_id(0), cu_k_ptr, segments, keys, BN)
    if first >= k_extent:
        return
    _, k_length = extent_keys(segment, cu_k_ptr, used_ptr, segments, keys)
    start, length = extent(segment, cu_q_ptr, segments, rows, False)
    length = tl.where(segment < segments, length, 0)
    q_row, k_row = q_row.to(tl.int64) * UNIT, k_row.to(tl.int64) * UNIT
    v_row, dout_row = v_row.to(tl.int64) * UNIT, dout_row.to(tl.int64) * UNIT
    dk_row, dv_row = dk_row.to(tl.int64) * UNIT, dv_row.to(tl.int64) * UNIT

    key = first + tl.arange(0, BN)
    k_base = k_ptr + k_start * k_row + k_head_number * (k_head.to(tl.int64) * UNIT)
    k0, k1 = load_split(k_base, key, k_row, k_length, D, D0, D1, True)
    v_base = v_ptr + k_start * v_row + k_head_number * (v_head.to(tl.int64) * UNIT)
    v0, v1 = load_split(v_base, key, v_row, k_length, D, D0, D1, True)
    shift = k_length - length
    begin, full_begin, full_end, end = visible_blocks(
        first - shift, tl.minimum(first + BN, k_length) - 1 - shift, right, left, length, BM
    )
    if first >= k_length:  # keys that seqused_k leaves out
        full_begin, full_end, end = begin, begin, begin
    dk0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    dv1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    for head in range(k_head_number * group, (k_head_number + 1) * group):
        q_base = q_ptr + start * q_row + head * (q_head.to(tl.int64) * UNIT)
        dout_base = dout_ptr + start * dout_row + head * (dout_head.to(tl.int64) * UNIT)
        per_row = tl.cast(head, tl.int64) * rows + start
        for block in range(full_begin, full_end):
            dk0, dk1, dv0, dv1 = dkv_block(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, key - shift, block, q_base, dout_base, lse_ptr + per_row,
                delta_ptr + per_row, q_row, dout_row, length, left, right, inner, outer, D, D0, D1, BM, SOFTCAP, False,
            )  # fmt: skip
        for edge in range(begin, end - (full_end - full_begin)):
            block = tl.where(edge < full_begin, edge, edge + (full_end - full_begin))
            dk0, dk1, dv0, dv1 = dkv_block(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, key - shift, block, q_base, dout_base, lse_ptr + per_row,
                delta_ptr + per_row, q_row, dout_row, length, left, right, inner, outer, D, D0, D1, BM, SOFTCAP, True,
            )  # fmt: skip
    # Sums of keys at or past k_length are those of zero keys, not zero: they are set to 0 here.
    real = (key < k_length)[:, None]
    dk_base = dk_ptr + k_start * dk_row + k_head_number * (dk_head.to(tl.int64) * UNIT)
    dv_base = dv_ptr + k_start * dv_row + k_head_number * (dv_head.to(tl.int64) * UNIT)
    dk0, dk1 = tl.where(real, dk0 * scale, 0.0), tl.where(real, dk1 * scale, 0.0)
    store_split(dk_base, key, dk_row, k_extent, dk0, dk1, D, D0, D1)
    store_split(dv_base, key, dv_row, k_extent, tl.where(real, dv0, 0.0), tl.where(real, dv1, 0.0), D, D0, D1)


def backward(
    dout_THD: Tensor,
    dlse_HT: Tensor | None,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    *,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend.forward`: dq (T, H, D), dk and dv (T_k, K, D), in the dtypes of q, k and v.

    Args: `dout_THD` and `dlse_HT`, the gradients of both results (None: the log-sum-exp was not used), then the
    arguments and results of the forward. Any strides are read; a `dout` that is not contiguous along D is copied.
    """
    rows, heads, dim = q_THD.shape
    q, k, v, out, dout = (launch.dense_rows(x) for x in (q_THD, k_TKD, v_TKD, out_THD, dout_THD))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta_HT = torch.empty_like(lse_HT)
    dlse_HT = None if dlse_HT is None else dlse_HT.contiguous()
    segments = cu_seqlens_q.numel() - 1
    inner, outer = launch.score_factors(scale, softcap)
    common = (rows, k.shape[0], segments, heads // k.shape[1], left, right, inner, outer, scale)
    with torch.cuda.device_of(q):
        choice = launch.choose("dq", dim, q.dtype)
        unit, strides = launch.strides(q, k, v, out, dout, dq)
        attend_dq[(rows // choice.rows + segments + 1, heads)](
            q, k, v, out, dout, lse_HT, delta_HT, dlse_HT, dq, cu_seqlens_q, cu_seqlens_k, seqused_k, *strides, *common,
            D=dim, D0=choice.split[0], D1=choice.split[1], UNIT=unit, SOFTCAP=softcap > 0,
            BM=choice.rows, BN=choice.keys, **choice.options,
        )  # fmt: skip
        choice = launch.choose("dkv", dim, q.dtype)
        unit, strides = launch.strides(q, k, v, dout, dk, dv)
        attend_dkv[(k.shape[0] // choice.keys + segments + 1, k.shape[1])](
            q, k, v, dout, lse_HT, delta_HT, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_k, *strides, *common,
            D=dim, D0=choice.split[0], D1=choice.split[1], UNIT=unit, SOFTCAP=softcap > 0,
            BM=choice.rows, BN=choice.keys, **choice.options,
        )  # fmt: skip
    return dq, dk, dv
