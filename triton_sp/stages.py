"""The way of the data, in order. Everything else installs, plans or speeds up what stands here.

    shard      each rank keeps its contiguous part of a token stream, and runs all token-wise layers on it
    pack       an attention layer sorts its local q, k, v by the rank that will attend with those heads
    exchange   one all-to-all: local tokens of all heads become all tokens of the local heads
    attend     varlen attention inside each segment of the stream, no padding
    exchange   one all-to-all back: all heads of the local tokens
    unpack     the heads in their order
    fuse       the vision stream's features become tokens of the text stream
    loss       each rank its tokens' share; the sum over ranks is the batch's loss

Shape letters: T local tokens, S tokens of the whole stream, H heads, K key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triton_sp.ops import pack, varlen
from triton_sp.plan.shards import Shards, moves
from triton_sp.plan.stream import RouteOnDevice, Stream, chunks
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group


def shard(x: Tensor, stream: Stream, dim: int = 0) -> Tensor:
    """This rank's tokens of a tensor whose `dim` is the whole stream. The adjoint of a slice is zero padding."""
    own = stream.shards.range(stream.group.rank)
    return x.narrow(dim, own.start, len(own))


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    stream: Stream,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention over the whole stream from this rank's tokens: two exchanges, a fair share of the heads each; no
    exchange where shards end with segments.

    Args:
        q_THD, k_TKD, v_TKD: this rank's tokens, all heads; position embeddings applied.

    Returns:
        (T, H, D), this rank's tokens, all heads.
    """
    attend = partial(varlen.varlen_attention, softcap=softcap, softmax_scale=softmax_scale)
    if stream.is_local:
        own = stream.shards.range(stream.group.rank)
        return attend(q_THD, k_TKD, v_TKD, stream.mask(own, own, causal, window))
    count = chunks(stream.chunks, q_THD.shape[1], k_TKD.shape[1], stream.group.size)
    parts = list(zip(*(x.chunk(count, 1) for x in (q_THD, k_TKD, v_TKD)), strict=True))
    routes = [stream.route(q.shape[1], k.shape[1], causal, window) for q, k, _ in parts]

    outs: list[Callable[[], Tensor]] = []
    arriving = _send(parts[0], routes[0], stream.group)
    for index, route in enumerate(routes):
        arrived = arriving
        if index + 1 < count:  # travels while this one is attended to
            arriving = _send(parts[index + 1], routes[index + 1], stream.group)
        outs.append(_attend(arrived(), route, stream.group, attend))
    results = [
        pack.unpack(out(), route.results, [(q.shape[0], q.shape[1])])[0]
        for out, route, (q, _, _) in zip(outs, routes, parts, strict=True)
    ]
    return results[0] if count == 1 else torch.cat(results, 1)


def _send(states: tuple[Tensor, ...], route: RouteOnDevice, group: Group) -> Callable[[], Tensor]:
    """pack and the first exchange."""
    host = route.host
    packed = pack.pack(states, route.inputs, sum(host.inputs.sizes))
    return collectives.begin_exchange(packed, host.inputs.sizes, host.arrivals.sizes, group)


def _attend(
    received: Tensor, route: RouteOnDevice, group: Group, attend: Callable[..., Tensor]
) -> Callable[[], Tensor]:
    """attend and the second exchange."""
    host = route.host
    outs = [attend(q, k, v, mask) for (q, k, v), mask in zip(_items(received, route), route.masks, strict=True)]
    return collectives.begin_exchange(_join(outs, received, route), host.outputs.sizes, host.results.sizes, group)


def _items(received: Tensor, route: RouteOnDevice) -> list[list[Tensor]]:
    """q, k and v of each task. Sources arrive in rank order and shards are contiguous, so that a buffer for one task of
    whole heads already is its stream in order, and is only viewed."""
    tasks = route.host.tasks
    if route.host.in_place:
        (task,) = tasks
        packed = received.unflatten(0, (len(task.rows), -1))
        return [list(packed.split([len(task.q), len(task.kv), len(task.kv)], 1))]
    shapes = [
        shape
        for task in tasks
        for shape in ((len(task.rows), len(task.q)), (len(task.keys), len(task.kv)), (len(task.keys), len(task.kv)))
    ]
    parts = pack.unpack(received, route.arrivals, shapes)
    return [parts[i : i + 3] for i in range(0, len(parts), 3)]


def _join(outs: list[Tensor], received: Tensor, route: RouteOnDevice) -> Tensor:
    """The tasks' outputs as the send buffer: one task's already is."""
    if not outs:  # a rank without work sends nothing, but must take part in the backward
        return received[:0]
    if len(outs) == 1:
        return outs[0].flatten(0, 1)
    return pack.pack(outs, route.outputs, sum(route.host.outputs.sizes))


def gather(x: Tensor, stream: Stream, unit: int = 1) -> Tensor:
    """The whole stream from this rank's tokens (dim 0), `unit` of which have become one row."""
    return collectives.gather(x, stream.shards.merged(unit).sizes, stream.group)


def reshard(x: Tensor, source: Shards, target: Shards, group: Group, index: Tensor | None = None) -> Tensor:
    """This rank's rows (dim 0) of a stream under another cut: each row goes from its owner to its next one, once.

    Args:
        index: (S,) int64 on the CPU, where the target's order is another than the source's: row i of the source is row
            `index[i]` of the target.
    """
    own = source.range(group.rank)
    if index is None:
        return x if source == target else collectives.exchange(x, *moves(source, target, group.rank), group)
    senders, wanted = torch.tensor(source.sizes), target.range(group.rank)
    owner = torch.arange(group.size).repeat_interleave(senders)  # of each row, in the source's order
    goal = torch.arange(group.size).repeat_interleave(torch.tensor(target.sizes))[index]
    # Each rank sends its rows in the order of the target, so that only the senders have to be merged on arrival.
    mine = index[own.start : own.stop]
    arriving = ((index >= wanted.start) & (index < wanted.stop)).nonzero().flatten()
    arriving = arriving[torch.argsort(owner[arriving] * max(source.total, 1) + index[arriving])]
    receive = torch.bincount(owner[arriving], minlength=group.size).tolist()
    send = torch.bincount(goal[own.start : own.stop], minlength=group.size).tolist()
    arrived = collectives.exchange(x[torch.argsort(mine).to(x.device)], send, receive, group)
    return arrived[torch.argsort(index[arriving]).to(x.device)]
