"""stages.attention on ranks, in fp64, against the textbook of the whole stream: heads that divide and that are cut, and
values whose head dim is not that of queries and keys; with learned sinks, whose gradient is summed over ranks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.kernels.mask import Mask
from triton_sp.ops import attend_cpu
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import resolve_group

STARTS = (0, 9, 20, 31)
SCALE = 0.4


def whole(heads: int, kv_heads: int, dim: int, v_dim: int) -> list[Tensor]:
    """q, k, v, dout and the sinks of the whole stream."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim)]
    found = [torch.randn(STARTS[-1], *shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [*found, torch.randn(heads, dtype=torch.float64, generator=generator)]


def expected(tensors: list[Tensor], causal: bool) -> list[Tensor]:
    """out and the gradients of q, k, v and the sinks by the textbook."""
    q, k, v, dout, sinks = (x.clone().requires_grad_() for x in tensors)
    mask = Mask(torch.tensor(STARTS), causal=causal)
    out, _ = attend_cpu.attend_exactly(q, k, v, mask, softmax_scale=SCALE, sinks=sinks)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), dout)]


def attend(heads: int, kv_heads: int, dim: int, v_dim: int, causal: bool, chunks: int) -> list[Tensor]:
    """What this rank makes of its tokens: its rows of `expected`."""
    group, segments = resolve_group(), Segments(STARTS)
    shards = shard_tokens(STARTS[-1], group.size)
    stream = Stream(group, shards, torch.tensor(STARTS), host_segments=segments, chunks=chunks)
    *tensors, sinks = whole(heads, kv_heads, dim, v_dim)
    q, k, v, dout = (stages.shard(x, stream).clone().requires_grad_() for x in tensors)
    sinks.requires_grad_()
    out = stages.attention((q, k, v), stream, causal=causal, softmax_scale=SCALE, sinks=sinks)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), dout)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "v_dim", "causal", "chunks", "size"),
    [
        (4, 2, 6, 4, True, 1, 2),
        (4, 2, 4, 6, False, 1, 2),
        (4, 4, 6, 3, True, 2, 2),
        (5, 5, 6, 4, True, 1, 3),  # cut heads, of which a rank has two tasks
        (2, 1, 6, 4, True, 1, 4),  # two heads for four ranks
    ],
)
def test_ranks_together_compute_the_textbook(
    ranks, heads: int, kv_heads: int, dim: int, v_dim: int, causal: bool, chunks: int, size: int
) -> None:
    found = ranks.run(attend, heads, kv_heads, dim, v_dim, causal, chunks, ranks=size)
    wanted = expected(whole(heads, kv_heads, dim, v_dim), causal)
    together = [torch.cat([parts[i] for parts in found]) for i in range(4)]
    together.append(torch.stack([parts[4] for parts in found]).sum(0))
    torch.testing.assert_close(together, wanted, rtol=1e-12, atol=1e-12)
