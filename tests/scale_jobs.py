"""What ranks do for test_scale.py: attention as the library does it, and the movements of the two-level exchange."""

from __future__ import annotations

import torch
import torch.distributed as dist

from perf.scale import Attention
from triton_sp import comm, pipeline
from triton_sp.groups import resolve_group
from triton_sp.pipeline import Stream
from triton_sp.plan import Segments, Shards, shard_tokens


def states(x: Attention, tokens: int) -> list[torch.Tensor]:
    return [torch.zeros(tokens, heads, x.dim, requires_grad=True) for heads in (x.heads, x.kv_heads, x.kv_heads)]


def one_level(x: Attention) -> tuple[int, int, int]:
    """(bytes sent forward, bytes sent backward, collectives forward) of this rank, in the library's attention."""
    group = resolve_group()
    shards = shard_tokens(x.tokens, group.size)
    segments = Segments((0, x.tokens))
    stream = Stream(group, shards, torch.tensor(segments.starts, dtype=torch.int32), known=segments)
    with comm.record() as forward:
        out = pipeline.attention(*states(x, shards.sizes[group.rank]), stream, causal=x.causal)
    with comm.record() as backward:
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
    with comm.record() as first:
        send = [local * (q_heads + 2 * kv_heads)] * node
        comm.exchange(torch.zeros(sum(send), x.dim), send, send, inside)
        back = [local * q_heads] * node
        comm.exchange(torch.zeros(sum(back), x.dim), back, back, inside)
    with comm.record() as second:
        kv = torch.zeros(x.tokens // nodes, 2 * kv_heads, x.dim)
        assert len(comm.gather(kv, Shards((x.tokens // nodes,) * nodes), between)) == x.tokens
    return first.bytes, second.bytes
