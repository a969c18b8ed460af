"""Attention of packed tokens, backward, for Hopper: five matrix products for each block, where the portable kernels
need seven.

A program of 8 warps owns a tile of keys and a query head, and visits the blocks of rows that see it. It computes the
scores once, sums dk and dv in registers, and adds its part of dq to a tensor in fp32 that all programs of a head add
to. The order of these sums changes from run to run, and with it the last bits of dq, and of dk and dv where heads are
grouped. Whether it runs is decided in gate.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_sp.kernels import launch
from triton_sp.kernels.hopper.attend import descriptors, reachable
from triton_sp.kernels.hopper.attend import takes as forward_takes
from triton_sp.kernels.hopper.moves import add_pair, add_product, clear_pair, fetch, fetch_if, matrix
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.tiles import extent, extent_keys, locate

ROWS, KEYS, WARPS = 64, 128, 8
STAGES = {64: 2, 72: 2, 80: 2, 128: 1}  # blocks of q on their way; with 2 at 128 registers spill (312 bytes)


@triton.jit
def row_terms(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, shift_ptr, delta_ptr, out_row, out_head, dout_row, dout_head, rows, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What the scores and the products dout v^T begin with, so that they need no more of a row: -lse / scale (-inf for
    a row without a key, whose weights then are 0) and dlse - rowsum(dout * out)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.arange(0, DP)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    at = row[:, None].to(tl.int64)
    out = tl.load(out_ptr + at * out_row + head * out_head.to(tl.int64) + col[None, :], mask=inside, other=0.0)
    dout = tl.load(dout_ptr + at * dout_row + head * dout_head.to(tl.int64) + col[None, :], mask=inside, other=0.0)
    per_row = head.to(tl.int64) * rows + row
    delta = -tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta += tl.load(dlse_ptr + per_row, mask=row < rows, other=0.0)
    lse = tl.load(lse_ptr + per_row, mask=row < rows, other=0.0)
    tl.store(shift_ptr + per_row, tl.where(lse == float("-inf"), lse, -lse / scale), mask=row < rows)
    tl.store(delta_ptr + per_row, delta, mask=row < rows)


@gluon.jit(do_not_specialize=launch.RUNTIME)
def attend_gluon_backward(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, dout0_desc, dout1_desc, dq_ptr, dk_ptr, dv_ptr, shift_ptr,
    delta_ptr, cu_q_ptr, cu_k_ptr, rows, keys, segments, group, right, outer,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds to dq (H, T, D), dk and dv (K, T_k, D), all fp32 and 0 before; dq and dk without the factor of the scores.

    No window, softcap, key_ranges or seqused_k, as hopper/attend.py. Scores are transposed, k q^T: their weights are
    then the left operand of dv and dk as they are.
    """
    DTYPE: gl.constexpr = q0_desc.dtype
    E: gl.constexpr = D1 if D1 > 0 else 16  # where the head dim has one part, the second is not used
    F: gl.constexpr = D1 if D1 > 0 else D0
    head = gl.program_id(1)
    segment, k_start, _, first = locate(gl.program_id(0), cu_k_ptr, segments, keys, BN)
    _, k_length = extent_keys(segment, cu_k_ptr, None, segments, keys)
    start, length = extent(segment, cu_q_ptr, segments, rows, False)
    length = gl.where(segment < segments, length, 0)
    seen = first - (k_length - length) - right  # the first row that sees the tile's first key; each further key, a row
    begin = gl.maximum(seen, 0) // BM
    end = (length + BM - 1) // BM
    if (first >= k_length) | (begin >= end):
        return

    k0 = gl.allocate_shared_memory(DTYPE, [1, BN, 1, D0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(DTYPE, [1, BN, 1, D0], v0_desc.layout)
    q0 = gl.allocate_shared_memory(DTYPE, [STAGES, BM, 1, D0], q0_desc.layout)
    dout0 = gl.allocate_shared_memory(DTYPE, [1, BM, 1, D0], dout0_desc.layout)
    if D1 > 0:
        k1 = gl.allocate_shared_memory(DTYPE, [1, BN, 1, D1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(DTYPE, [1, BN, 1, D1], v1_desc.layout)
        q1 = gl.allocate_shared_memory(DTYPE, [STAGES, BM, 1, D1], q1_desc.layout)
        dout1 = gl.allocate_shared_memory(DTYPE, [1, BM, 1, D1], dout1_desc.layout)
    else:
        k1, v1, q1, dout1 = k0, v0, q0, dout0
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], DTYPE)
    ds_tile = gl.allocate_shared_memory(DTYPE, [BN, BM], ds_layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 3):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    dout_full, k_full, v_full = bars.index(STAGES), bars.index(STAGES + 1), bars.index(STAGES + 2)

    k_row, k_head = k_start + first, head // group
    fetch(k0_desc, k1_desc, k0, k1, k_full, 0, k_row, k_head, BN, D0, D1)
    fetch(v0_desc, v1_desc, v0, v1, v_full, 0, k_row, k_head, BN, D0, D1)
    fetch(dout0_desc, dout1_desc, dout0, dout1, dout_full, 0, start + begin * BM, head, BM, D0, D1)
    for i in gl.static_range(STAGES):
        at = start + (begin + i) * BM
        fetch_if(begin + i < end, q0_desc, q1_desc, q0, q1, bars.index(i), i, at, head, BM, D0, D1)
    k0, k1, v0, v1 = matrix(k0, 0, BN, D0), matrix(k1, 0, BN, F), matrix(v0, 0, BN, D0), matrix(v1, 0, BN, F)
    dout0_, dout1_ = matrix(dout0, 0, BM, D0), matrix(dout1, 0, BM, F)
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    ragged = first + BN > k_length
    if ragged:  # keys of a neighbour: 0 * NaN would be NaN in dq
        clear_pair(k0, k1, k_length - first, BN, D0, D1)
        clear_pair(v0, v1, k_length - first, BN, D0, D1)
        fence_async_shared()
        gl.thread_barrier()

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    A0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D0, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, E, 16])
    Q0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D0 // 2, 16])
    Q1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, E // 2, 16])
    P0: gl.constexpr = gl.DotOperandLayout(0, A0, 2)
    P1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    key = gl.arange(0, BN, gl.SliceLayout(1, S))
    lowest = gl.where(key < k_length - first, seen + key, length)  # the first row that sees a key
    dk0, dv0 = gl.zeros([BN, D0], gl.float32, A0), gl.zeros([BN, D0], gl.float32, A0)
    dk1, dv1 = gl.zeros([BN, E], gl.float32, A1), gl.zeros([BN, E], gl.float32, A1)
    per_row = head.to(gl.int64) * rows + start
    for block in range(begin, end):
        turn = block - begin
        stage = turn % STAGES
        row = block * BM + gl.arange(0, BM, gl.SliceLayout(0, S))
        shift = gl.load(shift_ptr + per_row + row, mask=row < length, other=float("-inf"))
        delta = gl.load(delta_ptr + per_row + row, mask=row < length, other=0.0)
        q_full = bars.index(stage)
        mbarrier.wait(q_full, (turn // STAGES) & 1)
        mbarrier.wait(dout_full, turn & 1)
        q0_, q1_ = matrix(q0, stage, BM, D0), matrix(q1, stage, BM, F)
        if (block + 1) * BM > length:  # always the last block: nothing is asked for into these tiles any more
            clear_pair(q0_, q1_, length - block * BM, BM, D0, D1)
            clear_pair(dout0_, dout1_, length - block * BM, BM, D0, D1)
            fence_async_shared()
            gl.thread_barrier()
        zeros = gl.zeros([BN, BM], gl.float32, S)
        s = add_product(k0, k1, q0_, q1_, zeros + shift[None, :], D1)
        dp = add_product(v0, v1, dout0_, dout1_, zeros + delta[None, :], D1)
        s = warpgroup_mma_wait(2 if D1 > 0 else 1, deps=[s])
        p = gl.exp2(s * outer)
        if ragged | (block * BM < seen + BN - 1):
            p = gl.where(row[None, :] >= lowest[:, None], p, 0.0)
        narrow = p.to(DTYPE)
        dv0 = warpgroup_mma(gl.convert_layout(narrow, P0), dout0_, dv0, is_async=True)
        if D1 > 0:
            dv1 = warpgroup_mma(gl.convert_layout(narrow, P1), dout1_, dv1, is_async=True)
            dp, dv0, dv1 = warpgroup_mma_wait(0, deps=[dp, dv0, dv1])
        else:
            dp, dv0 = warpgroup_mma_wait(0, deps=[dp, dv0])
        ds = gl.where(p == 0.0, 0.0, p * dp)  # where a row is not seen and its dout is NaN, 0 * NaN
        ds_tile.store(ds.to(DTYPE))
        fence_async_shared()
        gl.thread_barrier()  # all of ds is there, and nobody reads this block of dout any more
        following = start + (block + 1) * BM
        fetch_if(block + 1 < end, dout0_desc, dout1_desc, dout0, dout1, dout_full, 0, following, head, BM, D0, D1)
        dq0 = warpgroup_mma(
            ds_tile.permute((1, 0)), k0, gl.zeros([BM, D0], gl.float32, Q0), use_acc=False, is_async=True
        )
        dk0 = warpgroup_mma(ds_tile, q0_, dk0, is_async=True)
        if D1 > 0:
            dq1 = warpgroup_mma(
                ds_tile.permute((1, 0)), k1, gl.zeros([BM, E], gl.float32, Q1), use_acc=False, is_async=True
            )
            dk1 = warpgroup_mma(ds_tile, q1_, dk1, is_async=True)
            dk0, dk1, dq0, dq1 = warpgroup_mma_wait(0, deps=[dk0, dk1, dq0, dq1])
        else:
            dk0, dq0 = warpgroup_mma_wait(0, deps=[dk0, dq0])
            dq1 = dq0  # not used
        gl.thread_barrier()  # nobody reads this block of q, or ds, any more
        following = start + (block + STAGES) * BM
        fetch_if(block + STAGES < end, q0_desc, q1_desc, q0, q1, q_full, stage, following, head, BM, D0, D1)
        place = dq_ptr + (per_row + block * BM) * D
        add_pair(place, dq0, dq1, length - block * BM, D, BM, D0, D1, Q0, Q1)
    place = (k_head.to(gl.int64) * keys + k_row) * D
    add_pair(dk_ptr + place, dk0, dk1, k_length - first, D, BN, D0, D1, A0, A1)
    add_pair(dv_ptr + place, dv0, dv1, k_length - first, D, BN, D0, D1, A0, A1)


def takes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Mask, softcap: float) -> bool:
    """Whether this tier has a kernel for a call of `attend_backward.backward`."""
    return forward_takes(q, k, v, mask, softcap) and dout.dtype == q.dtype and reachable(dout)


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
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_backward.backward`, for what `takes` accepts; sums are in no fixed order."""
    (rows, heads, dim), keys = q_THD.shape, len(k_TKD)
    split, out = launch.split(dim), launch.dense_rows(out_THD)
    dlse = None if dlse_HT is None else dlse_HT.contiguous()
    shift, delta = (torch.empty(heads, rows, dtype=torch.float32, device=q_THD.device) for _ in range(2))
    sums = [torch.zeros(*size, dim, dtype=torch.float32, device=q_THD.device)
            for size in ((heads, rows), (k_TKD.shape[1], keys), (k_TKD.shape[1], keys))]  # fmt: skip
    blocks = ((q_THD, ROWS), (k_TKD, KEYS), (v_TKD, KEYS), (dout_THD, ROWS))
    parts = [descriptor for x, size in blocks for descriptor in descriptors(x, size, split)]
    cu_seqlens_q, cu_seqlens_k, *_ = mask.tables
    segments = mask.cu_seqlens_q.numel() - 1
    with torch.cuda.device_of(q_THD):
        row_terms[(triton.cdiv(rows, ROWS), heads)](
            out, dout_THD, lse_HT, dlse, shift, delta, *out.stride()[:2], *dout_THD.stride()[:2], rows, softmax_scale,
            D=dim, DP=triton.next_power_of_2(dim), BM=ROWS, num_warps=4,
        )  # fmt: skip
        attend_gluon_backward[(keys // KEYS + segments + 1, heads)](
            *parts, *sums, shift, delta, cu_seqlens_q, cu_seqlens_k, rows, keys, segments, heads // k_TKD.shape[1],
            mask.right, launch.score_factors(softmax_scale, 0.0)[1],
            D=dim, D0=split[0], D1=split[1], BM=ROWS, BN=KEYS, STAGES=STAGES[dim], num_warps=WARPS,
        )  # fmt: skip
    places = grads or tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TKD, v_TKD))
    for place, x, factor in zip(places, sums, (softmax_scale, softmax_scale, 1.0), strict=True):
        torch.mul(x.transpose(0, 1), factor, out=place)
    return places  # type: ignore[return-value]
