"""What ranks do for test_scale.py: attention as the library does it, and the movements of the two-level exchange."""

from __future__ import annotations

import torch
import torch.distributed as dist

from perf.scale import Attention
from triton_sp import stages
from triton_sp.kernels.mask import States
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import resolve_group


def states(x: Attention, tokens: int) -> States:
    q, k, v = (torch.zeros(tokens, heads, x.dim, requires_grad=True) for heads in (x.heads, x.kv_heads, x.kv_heads))
    return q, k, v


def one_level(x: Attention) -> tuple[int, int, int]:
    """(bytes sent forward, bytes sent backward, collectives forward) of this rank, in the library's attention."""
    group = resolve_group()
    shards = shard_tokens(x.tokens, group.size)
    segments = Segments((0, x.tokens))
    stream = Stream(group, shards, torch.tensor(segments.starts, dtype=torch.int32), host_segments=segments)
    with collectives.record() as forward:
        out = stages.attention(states(x, shards.sizes[group.rank]), stream, causal=x.causal)
    with collectives.record() as backward:
        out.sum().backward()
    return forward.bytes, backward.bytes, len(forward.entries)


def two_level(x: Attention, node: int) -> tuple[int, int]:
    """(bytes sent inside the node, between nodes): heads exchanged inside, keys and values gathered between."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inside_groups = [dist.new_group(list(range(first, first + node))) for first in range(0, ranks, node)]
    between_groups = [dist.new_group(list(range(first, ranks, node))) for first in range(node)]
    inside, between = resolve_group(inside_groups[rank // node]), resolve_group(between_groups[rank % node])
    local, nodes = x.tokens // ranks, ranks // node
    q_heads, kv_heads = x.heads // node, max(x.kv_heads // node, 1)
    with collectives.record() as first:
        send = [local * (q_heads + 2 * kv_heads)] * node
        collectives.exchange(torch.zeros(sum(send), x.dim), send, send, inside)
        back = [local * q_heads] * node
        collectives.exchange(torch.zeros(sum(back), x.dim), back, back, inside)
    with collectives.record() as second:
        kv = torch.zeros(x.tokens // nodes, 2 * kv_heads, x.dim)
        assert len(collectives.gather(kv, (x.tokens // nodes,) * nodes, between)) == x.tokens
    return first.bytes, second.bytes
