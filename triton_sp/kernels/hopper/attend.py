"""Attention of packed tokens, forward, for Hopper (sm_90): the portable kernel's work in FlashAttention 3's order.

Three groups of 4 warps share a program. One asks the TMA for tiles of q, k and v, into a ring in shared memory; the
other two own 64 rows each, and compute the softmax of one block of keys while the matrix units still do the product
of the block before. Whether it runs is decided in gate.py; what it does not take runs on kernels/attend.py.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_sp.kernels import launch
from triton_sp.kernels.hopper.tiles import clear_rows, part, ring, scores, settle, soften, stretch, weigh, write
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.tiles import extent_keys, locate

ROWS, KEYS = 128, 128
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
DIMS = (64, 72, 80, 128)


@gluon.jit
def load_partition(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, q0, q1, k0, k1, v0, v1, bars, begin, k_begin, keys, blocks,
    head, k_head, BM: gl.constexpr, BN: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring. Barriers: k full, v full, k empty, v empty (STAGES each), q full, v as it arrived."""
    SIZE: gl.constexpr = BN * (D0 + D1) * 2
    q_full, raw = bars.index(4 * STAGES), bars.index(4 * STAGES + 1)
    mbarrier.expect(q_full, BM * (D0 + D1) * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q0_desc, [begin + half * (BM // 2), head, 0], q_full, q0.index(half))
        if D1 > 0:
            tma.async_copy_global_to_shared(q1_desc, [begin + half * (BM // 2), head, D0], q_full, q1.index(half))
    for block in range(blocks):
        stage = block % STAGES
        row = k_begin + block * BN
        empty, phase = ring(bars, 2 * STAGES, block, STAGES)
        mbarrier.wait(empty, phase ^ 1)
        full, phase = ring(bars, 0, block, STAGES)
        mbarrier.expect(full, SIZE)
        tma.async_copy_global_to_shared(k0_desc, [row, k_head, 0], full, k0.index(stage))
        if D1 > 0:
            tma.async_copy_global_to_shared(k1_desc, [row, k_head, D0], full, k1.index(stage))
        empty, phase = ring(bars, 3 * STAGES, block, STAGES)
        mbarrier.wait(empty, phase ^ 1)
        full, phase = ring(bars, STAGES, block, STAGES)
        # A block that ends past the segment, always the last one, is not full before its rest is cleared.
        ragged = (block + 1) * BN > keys
        arrived = bars.index(gl.where(ragged, 4 * STAGES + 1, STAGES + stage))
        mbarrier.expect(arrived, SIZE)
        tma.async_copy_global_to_shared(v0_desc, [row, k_head, 0], arrived, v0.index(stage))
        if D1 > 0:
            tma.async_copy_global_to_shared(v1_desc, [row, k_head, D0], arrived, v1.index(stage))
        if ragged:
            mbarrier.wait(raw, 0)
            clear_rows(part(v0, stage, BN, D0), keys - block * BN, BN, D0, 4)
            if D1 > 0:
                clear_rows(part(v1, stage, BN, D1), keys - block * BN, BN, D1, 4)
            fence_async_shared()
            gl.thread_barrier()  # every warp's rows are written before one thread says so
            mbarrier.arrive(full, count=1)


@gluon.jit
def attend_partition(
    q0, q1, k0, k1, v0, v1, bars, out_ptr, lse_ptr, out_row, limit, position, right, keys, blocks, outer,
    WHICH: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """ROWS rows against all their blocks. The order: scores of block j issued, weights of block j - 1 times v issued,
    softmax of block j while that product runs. WAIT leaves no product running: slower, and must be equal bit for bit.
    """
    DTYPE: gl.constexpr = q0.dtype
    E: gl.constexpr = D1 if D1 > 0 else 16
    RUNNING: gl.constexpr = 0 if WAIT else (2 if D1 > 0 else 1)  # products of the block before, while the softmax runs
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    P0: gl.constexpr = gl.DotOperandLayout(0, A0, 2)
    P1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    rows: gl.constexpr = gl.SliceLayout(1, S)
    q0, q1 = part(q0, WHICH, ROWS, D0), part(q1, WHICH, ROWS, D1 if D1 > 0 else D0)
    row = gl.arange(0, ROWS, rows)
    highest = gl.minimum(position + row + right, keys - 1)
    lowest = gl.minimum(position + right, keys - 1)
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    acc0 = gl.zeros([ROWS, D0], gl.float32, A0)
    acc1 = gl.zeros([ROWS, E], gl.float32, A1)
    top = gl.full([ROWS], float("-inf"), gl.float32, rows)
    total = gl.zeros([ROWS], gl.float32, rows)

    mbarrier.wait(bars.index(4 * STAGES), 0)
    mbarrier.wait(bars.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[scores(q0, q1, k0, k1, 0, zeros, BN, D0, D1)])
    mbarrier.arrive(bars.index(2 * STAGES), count=1)
    p, alpha, top, total = soften(s, top, total, highest, lowest, 0, outer, BN, S, DTYPE)
    for block in range(1, blocks):
        full, phase = ring(bars, 0, block, STAGES)
        mbarrier.wait(full, phase)
        s = scores(q0, q1, k0, k1, block % STAGES, zeros, BN, D0, D1)
        if WAIT:
            s = warpgroup_mma_wait(0, deps=[s])
        full, phase = ring(bars, STAGES, block - 1, STAGES)
        mbarrier.wait(full, phase)
        p0, p1 = gl.convert_layout(p, P0), gl.convert_layout(p, P1)
        acc0, acc1 = weigh(acc0, acc1, p0, p1, v0, v1, (block - 1) % STAGES, BN, D0, D1)
        s = warpgroup_mma_wait(RUNNING, deps=[s])
        empty, phase = ring(bars, 2 * STAGES, block, STAGES)
        mbarrier.arrive(empty, count=1)
        p, alpha, top, total = soften(s, top, total, highest, lowest, block * BN, outer, BN, S, DTYPE)
        if keys < 0:
            # Never true, but ptxas 12.8 does not move the wait below across it. Without it the wait comes
            # before all of the softmax; with it, after the maximum and some 28 of 64 exponentials a thread.
            gl.thread_barrier()
        acc0, acc1 = settle(acc0, acc1, D1)
        empty, phase = ring(bars, 3 * STAGES, block - 1, STAGES)
        mbarrier.arrive(empty, count=1)
        acc0, acc1 = stretch(acc0, alpha), stretch(acc1, alpha)
    full, phase = ring(bars, STAGES, blocks - 1, STAGES)
    mbarrier.wait(full, phase)
    p0, p1 = gl.convert_layout(p, P0), gl.convert_layout(p, P1)
    acc0, acc1 = weigh(acc0, acc1, p0, p1, v0, v1, (blocks - 1) % STAGES, BN, D0, D1)
    acc0, acc1 = settle(acc0, acc1, D1)
    scale = 1.0 / gl.where(total == 0.0, 1.0, total)  # the sum over no key is 0, and so is out
    out_ptr += WHICH * ROWS * out_row
    write(out_ptr, stretch(acc0, scale), limit, out_row, 0, D, ROWS, D0)
    if D1 > 0:
        write(out_ptr, stretch(acc1, scale), limit, out_row, D0, D, ROWS, D1)
    lse = gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse_ptr + WHICH * ROWS + row, lse, mask=row < limit)


@gluon.jit(do_not_specialize=launch.RUNTIME)
def attend_gluon(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, out_row, out_head,
    rows, keys, segments, group, right, outer,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WAIT: gl.constexpr,
):  # fmt: skip
    """As attend.attend_forward, of which this is a part: no window, no softcap, no seqused_k."""
    HALF: gl.constexpr = BM // 2
    DTYPE: gl.constexpr = q0_desc.dtype
    head = gl.program_id(1)
    segment, start, length, first = locate(gl.program_id(0), cu_q_ptr, segments, rows, BM)
    if first >= length:
        return
    k_start, k_length = extent_keys(segment, cu_k_ptr, None, segments, keys)
    position = first + k_length - length
    end = gl.minimum(gl.minimum(first + BM, length) + k_length - length + right, k_length)
    # Rows without a key still see one block, so that all groups count the same; and all of it is cleared.
    blocks = gl.maximum((end + BN - 1) // BN, 1)
    k_length = gl.where(end > 0, k_length, 0)

    q0 = gl.allocate_shared_memory(DTYPE, [2, HALF, 1, D0], q0_desc.layout)
    k0 = gl.allocate_shared_memory(DTYPE, [STAGES, BN, 1, D0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(DTYPE, [STAGES, BN, 1, D0], v0_desc.layout)
    if D1 > 0:
        q1 = gl.allocate_shared_memory(DTYPE, [2, HALF, 1, D1], q1_desc.layout)
        k1 = gl.allocate_shared_memory(DTYPE, [STAGES, BN, 1, D1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(DTYPE, [STAGES, BN, 1, D1], v1_desc.layout)
    else:
        q1, k1, v1 = q0, k0, v0
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES + 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4 * STAGES + 2):
        # An empty slot is one that both halves have left.
        mbarrier.init(bars.index(i), count=2 if i >= 2 * STAGES and i < 4 * STAGES else 1)
    fence_async_shared()

    out_row = out_row.to(gl.int64) * 8
    out_ptr += (start + first) * out_row + head * (out_head.to(gl.int64) * 8)
    lse_ptr += head.to(gl.int64) * rows + start + first
    limit = length - first
    gl.warp_specialize(
        [
            (attend_partition, (
                q0, q1, k0, k1, v0, v1, bars, out_ptr, lse_ptr, out_row, limit, position, right, k_length, blocks,
                outer, 0, D, D0, D1, HALF, BN, STAGES, WAIT,
            )),
            (attend_partition, (
                q0, q1, k0, k1, v0, v1, bars, out_ptr, lse_ptr, out_row, limit - HALF, position + HALF, right, k_length,
                blocks, outer, 1, D, D0, D1, HALF, BN, STAGES, WAIT,
            )),
            (load_partition, (
                q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, q0, q1, k0, k1, v0, v1, bars, start + first,
                k_start, k_length, blocks, head, head // group, BM, BN, D0, D1, STAGES,
            )),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float) -> bool:
    """Whether this tier has a kernel for a call of `attend.forward`; that one has a kernel for all others.

    >>> q, table = torch.zeros(10, 2, 80, dtype=torch.bfloat16), torch.tensor([0, 10])
    >>> takes(q, q, q, Mask(table, causal=True), 0.0), takes(q, q, q, Mask(table, window=100), 0.0)
    (True, False)
    """
    plain = mask.window is None and mask.seqused_k is None and mask.key_ranges is None and not softcap
    dtypes = q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
    return q.shape[-1] == v.shape[-1] and q.shape[-1] in DIMS and dtypes and plain and all(map(reachable, (q, k, v)))


def reachable(x: Tensor) -> bool:
    """Whether the TMA can address a tensor: not empty, contiguous along D, all else on 16 bytes."""
    strides = [0 < x.stride(axis) < 1 << 24 and x.stride(axis) % 8 == 0 for axis in (0, 1)]
    return x.numel() > 0 and x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(strides)


def descriptors(x: Tensor, rows: int, split: tuple[int, int]) -> list[TensorDescriptor]:
    """How the TMA reads blocks of `rows` rows of one head of x, one for each part of the head dim."""
    found = []
    for part_ in split[: 1 if split[1] == 0 else 2]:
        layout = gl.NVMMASharedLayout.get_default_for([rows, 1, part_], DTYPES[x.dtype])
        found.append(TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, part_], layout))
    return [found[0], found[-1]]


def forward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    out_THD: Tensor | None = None,
    wait: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `attend.forward`, for what `takes` accepts; `out_THD` must be `reachable`, `wait` is for check.py."""
    rows, heads, dim = q_THD.shape
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out_THD is None else out_THD
    lse_HT = torch.empty(heads, rows, dtype=torch.float32, device=q_THD.device)
    split = launch.split(dim)
    blocks = ((q_THD, ROWS // 2), (k_TKD, KEYS), (v_TKD, KEYS))
    parts = [descriptor for x, size in blocks for descriptor in descriptors(x, size, split)]
    cu_seqlens_q, cu_seqlens_k, *_ = mask.tables
    segments = mask.cu_seqlens_q.numel() - 1
    with torch.cuda.device_of(q_THD):
        attend_gluon[(rows // ROWS + segments + 1, heads)](
            *parts, out, lse_HT, cu_seqlens_q, cu_seqlens_k, out.stride(0) // 8, out.stride(1) // 8,
            rows, k_TKD.shape[0], segments, heads // k_TKD.shape[1], mask.right,
            launch.score_factors(softmax_scale, 0.0)[1],
            D=dim, D0=split[0], D1=split[1], BM=ROWS, BN=KEYS, STAGES=2, WAIT=wait, num_warps=4,
        )  # fmt: skip
    return out, lse_HT
