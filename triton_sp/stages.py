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

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp.ops import varlen
from triton_sp.ops.backends.choice import Choice
from triton_sp.ops.differentiable import once_differentiable
from triton_sp.ops.pack import Rotate, Rotation, weights_gradients
from triton_sp.plan.route import HeadRoute, States
from triton_sp.plan.shards import Shards, moves
from triton_sp.plan.stream import Stream, chunks
from triton_sp.ranks import collectives
from triton_sp.ranks.backwards import note_backward
from triton_sp.ranks.collectives import Pending, begin_all_to_all, finish
from triton_sp.ranks.groups import Group


def shard(x: Tensor, stream: Stream, dim: int = 0) -> Tensor:
    """This rank's tokens of a tensor whose `dim` is the whole stream. The adjoint of a slice is zero padding."""
    return x.narrow(dim, stream.own.start, len(stream.own))


class Layer(NamedTuple):
    """What the layers of a stream that attend in one way have in common."""

    causal: bool
    window: int | None
    softcap: float
    softmax_scale: float
    dims: tuple[int, int]  # head dim of q and k, and of v
    attention: Choice | None = None

    @property
    def factors(self) -> dict[str, Any]:
        """What the operators of the stage attend are told beside the mask."""
        return {"softcap": self.softcap, "softmax_scale": self.softmax_scale, "attention": self.attention}

    def widen(self, states: States) -> States:
        """q, k and v as wide as the widest of them, because they travel in one buffer."""
        if self.dims[0] == self.dims[1]:
            return states
        q, k, v = (F.pad(x, (0, max(self.dims) - x.shape[-1])) for x in states)
        return q, k, v

    def narrow(self, states: States) -> States:
        """q, k and v without the columns that `widen` has added."""
        (q, k, v), (dim, v_dim) = states, self.dims
        return states if dim == v_dim else (q[..., :dim], k[..., :dim], v[..., :v_dim])


@torch.compiler.disable(reason="the exchange of heads is one eager operator a layer")
def attention(
    states: States,
    stream: Stream,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Attention over the whole stream from this rank's tokens: two exchanges, a fair share of the heads each; no
    exchange where shards end with segments.

    Args:
        states: q (T, H, D), k (T, K, D) and v (T, K, V), this rank's tokens, all heads, in one dtype; position
            embeddings applied, but for `rotation`.
        sinks: (H,), the learned sinks of all heads, the same on every rank. Their gradient is this rank's share, to be
            summed over ranks as that of every replicated parameter.
        rotation: rotary embeddings of this rank's tokens, by which q and k are rotated where they are packed, and the
            norms of their heads before that. The gradients of the norms' weights are this rank's share, as of sinks.

    Returns:
        (T, H, V), this rank's tokens, all heads.
    """
    q_THD, _, v_TKD = states
    dims = q_THD.shape[-1], v_TKD.shape[-1]
    scale = dims[0] ** -0.5 if softmax_scale is None else softmax_scale
    layer = Layer(causal, window, softcap or 0.0, scale, dims, stream.attention)
    weights = () if rotation is None or rotation.norm is None else rotation.norm.weights
    if stream.is_local:
        mask = stream.mask(stream.own, stream.own, causal, window)
        if rotation is not None:
            states = (*Rotate.apply(*states[:2], rotation, *weights), v_TKD)
        return varlen.attend_eagerly(states if sinks is None else (*states, sinks), mask, **layer.factors)
    with torch.autocast(q_THD.device.type, enabled=False):
        return note_backward(ExchangeHeads.apply(*states, sinks, stream, layer, rotation, *weights))


class ExchangeHeads(torch.autograd.Function):
    """The stages of one layer as one operator, and their adjoints in the opposite order.

    With `stream.chunks` heads are done in parts: one part travels while another is attended to. Kept for the backward
    are the receive buffer (q, k and v of this rank's heads), the outputs and the log-sum-exp; of norms their inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        stream: Stream,
        layer: Layer,
        rotation: Rotation | None = None,
        *weights: Tensor,
    ) -> Tensor:
        group, parts = stream.group, _parts(layer.widen((q, k, v)), stream, layer)
        needed, kept, returning = any(ctx.needs_input_grad), [], []

        def send(part: _Part) -> Pending:  # pack, exchange
            flat = part.route.pack(part.states, rotation)
            return begin_all_to_all(flat, part.route.sent, part.route.received, group)

        arriving = send(parts[0])
        for part, following in zip_longest(parts, parts[1:]):
            received = finish(arriving)
            if following is not None:
                arriving = send(following)
            route = part.route
            attended = [  # attend
                varlen.forward(*layer.narrow(states), mask, **layer.factors, sinks=own)
                for states, mask, own in zip(route.states(received), route.masks, part.sinks(sinks), strict=True)
            ]
            outs = route.join([out for out, _ in attended], received[..., : layer.dims[1]])
            returning.append(begin_all_to_all(outs, route.returned, route.results, group))  # exchange
            kept += [received, *(x for pair in attended for x in pair)] if needed else []
            del received, attended, outs  # while nothing is kept, they are gone before the next part is here
        result = q.new_empty(*q.shape[:2], layer.dims[1])
        for part, coming in zip(parts, returning, strict=True):
            part.route.unpack(finish(coming), result[:, part.heads])  # unpack
        ctx.stream, ctx.layer, ctx.rotation, ctx.shapes = stream, layer, rotation, (q.shape, k.shape, v.shape)
        ctx.save_for_backward(sinks, *((q, k, *weights) if weights else [None] * 4), *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (sinks, q, k, *saved), stream, layer = ctx.saved_tensors, ctx.stream, ctx.layer
        weights, kept, dsinks, dweights = saved[:2], iter(saved[2:]), None, None
        if sinks is not None:
            dsinks = torch.zeros_like(sinks, dtype=torch.promote_types(sinks.dtype, torch.float32))
        dq, dk, dv = grads = tuple(dout.new_empty(*shape[:2], max(layer.dims)) for shape in ctx.shapes)
        group, parts, returning = stream.group, _parts((dq, dk, dv), stream, layer), []

        def send(part: _Part) -> Pending:  # the adjoints of unpack and of the exchange before it
            flat = part.route.pack_gradients(dout[:, part.heads])
            return begin_all_to_all(flat, part.route.results, part.route.returned, group)

        arriving = send(parts[0])
        for part, following in zip_longest(parts, parts[1:]):
            douts = part.route.split(finish(arriving))
            if following is not None:
                arriving = send(following)
            route, received = part.route, next(kept)
            buffer, places = route.places(received)
            tasks = zip(route.states(received), places, route.masks, douts, strict=True)
            learned = zip(part.sinks(sinks), part.sinks(dsinks), strict=True)
            for (states, place, mask, own), (sink, dsink) in zip(tasks, learned, strict=True):
                forward = (*layer.narrow(states), next(kept), next(kept), *([] if sink is None else [sink]))
                places_of = layer.narrow(place)
                found = varlen.backward(own, None, forward, mask, **layer.factors, grads=places_of)  # of attend
                if dsink is not None and found.dsinks is not None:
                    dsink += found.dsinks
            flat = route.join_gradients(buffer, places)
            returning.append(begin_all_to_all(flat, route.received, route.sent, group))  # of the exchange
        for part, coming in zip(parts, returning, strict=True):
            rotation = part.before(ctx.rotation, q, k, weights)
            summed = part.route.unpack_gradients(finish(coming), part.states, rotation)  # of pack
            dweights = summed if dweights is None or summed is None else dweights + summed
        return *layer.narrow(grads), dsinks, None, None, None, *weights_gradients(dweights, weights)


class _Part(NamedTuple):
    """The heads that are exchanged at a time: all, or a chunk."""

    route: HeadRoute
    states: States
    heads: slice  # of the queries and the outputs
    kv_heads: slice

    def before(self, rotation: Rotation | None, q: Tensor, k: Tensor, weights: Sequence[Tensor]) -> Rotation | None:
        """With q and k of all heads as they were before norms."""
        if rotation is None or rotation.norm is None:
            return rotation
        return rotation.of(q[:, self.heads], k[:, self.kv_heads], *weights)

    def sinks(self, sinks: Tensor | None) -> list[Tensor | None]:
        """Those of each task, of all or of their gradients."""
        if sinks is None:
            return [None] * len(self.route.tasks)
        return [sinks[self.heads][task.q.start : task.q.stop] for task in self.route.tasks]


def _parts(states: States, stream: Stream, layer: Layer) -> list[_Part]:
    q, k, v = states
    count = chunks(stream.chunks, q.shape[1], k.shape[1], stream.group.size)
    heads, kv_heads = q.shape[1] // count, k.shape[1] // count
    route = stream.route(heads, kv_heads, layer.causal, layer.window)
    if count == 1:
        return [_Part(route, (q, k, v), slice(None), slice(None))]
    parts = zip(q.split(heads, 1), k.split(kv_heads, 1), v.split(kv_heads, 1), strict=True)
    own = [[slice(i * n, (i + 1) * n) for n in (heads, kv_heads)] for i in range(count)]
    return [_Part(route, states, *slices) for states, slices in zip(parts, own, strict=True)]


def gather(x: Tensor, stream: Stream, unit: int = 1) -> Tensor:
    """The whole stream from this rank's tokens (dim 0), `unit` of which have become one row."""
    return collectives.gather(x, stream.shards.merged(unit).sizes, stream.group)


def reshard(x: Tensor, source: Shards, target: Shards, group: Group, index: Tensor | None = None) -> Tensor:
    """This rank's rows (dim 0) of a stream under another cut: each row goes from its owner to its next one, once.

    Args:
        index: (S,) int64 on the CPU, where the target's order is another than the source's: row i of the source is row
            `index[i]` of the target.
    """
    if index is None:
        return x if source == target else collectives.exchange(x, *moves(source, target, group.rank), group)
    ranks, row = torch.arange(group.size), torch.argsort(index)  # which row of the source each row of the target is
    owner = ranks.repeat_interleave(torch.tensor(source.sizes))[row]
    needer = ranks.repeat_interleave(torch.tensor(target.sizes))
    arrived, order = exchange_rows(x, owner, row - torch.tensor(source.starts)[owner], needer, group)
    return arrived[order.to(x.device)]


def exchange_rows(x: Tensor, owner: Tensor, place: Tensor, needer: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Each row of a stream goes from the rank that has it to the rank that needs it. One exchange.

    Args:
        x: (rows, ...), what this rank has. Rows that no one needs stay where they are.
        owner, place: (S,) int64 on the CPU, for each row of the stream the rank that has it, and where in its `x`.
        needer: (S,) the rank that needs it.

    Returns:
        The rows that have come, and for each row that this rank needs, in the order of the stream, which of them it is.
    """
    mine, needed = owner == group.rank, needer == group.rank
    # Each rank sends its rows in the order of the stream, so that only the senders have to be merged on arrival.
    leaving = place[mine][needer[mine].argsort(stable=True)]
    send, receive = (ranks.bincount(minlength=group.size).tolist() for ranks in (needer[mine], owner[needed]))
    if len(leaving) != len(x) or not bool((leaving.diff() == 1).all()):
        x = x.index_select(0, leaving.to(x.device, non_blocking=True))
    return collectives.exchange(x, send, receive, group), owner[needed].argsort(stable=True).argsort()
