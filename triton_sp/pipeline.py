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
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from triton_sp import comm, ops, packing
from triton_sp.cost import PlanName
from triton_sp.groups import Group
from triton_sp.heads import Route, describe_share, route, share_heads, share_whole_heads
from triton_sp.plan import Segments, Shards, moves


class Mask(NamedTuple):
    """What some rows see of some keys: the arguments of `ops.varlen_attention` that say so."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None
    key_ranges: Tensor | None
    causal: bool
    window: int | None


@dataclass(frozen=True, eq=False)
class Stream:
    """One token stream of one batch, as every rank of the group sees it. Immutable, so that a recomputation in the
    backward reads what the forward read; what layers have in common is worked out once.

    Attributes:
        cu_seqlens: int32 (segments + 1,), the segments of the whole stream.
        seqused_k: int32 (segments,), or None where every token of a segment is a key of it. A padding position that
            carries a label is a segment of one row and no key.
        known: the values of cu_seqlens, and the spans if there are any; None if the values are not at hand: they are
            then read from the device when needed, once.
        plan: "segments" if shards end where segments end, of these layers or of others.
        chunks: heads are exchanged and attended to in so many parts, if they divide, one travelling while another is
            attended to.
    """

    group: Group
    shards: Shards
    cu_seqlens: Tensor
    seqused_k: Tensor | None = None
    known: Segments | None = None
    plan: PlanName = "heads"
    chunks: int = 1
    _masks: dict[tuple[range, range, bool, int | None], Mask] = field(default_factory=dict, repr=False)
    _ranges: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    _passages: dict[tuple[int, int, bool, int | None], Passage] = field(default_factory=dict, repr=False)

    @property
    def local(self) -> slice:
        own = self.shards.range(self.group.rank)
        return slice(own.start, own.stop)

    @cached_property
    def segments(self) -> Segments:
        return self.known or Segments(tuple(self.cu_seqlens.tolist()))

    @cached_property
    def is_local(self) -> bool:
        """Whether every segment is one rank's, so that layers attend to what they have."""
        return self.group.size == 1 or (self.plan == "segments" and self.segments.local(self.shards))

    def describe(self) -> str:
        """How the layers that have run attended on this rank."""
        if self.is_local:
            return "no exchange"
        shares = {describe_share(passage.route.share, self.shards.total) for passage in self._passages.values()}
        return " or ".join(sorted(shares))

    def passage(self, num_heads: int, num_kv_heads: int, causal: bool, window: int | None) -> Passage:
        """How layers with these heads and this mask exchange."""
        key = (num_heads, num_kv_heads, causal, window)
        if key not in self._passages:
            ranks = self.group.size
            # Whole heads need not know the segments, which may still be on the device.
            shares = share_whole_heads(num_heads, num_kv_heads, ranks, self.shards.total)
            shares = shares or share_heads(num_heads, num_kv_heads, ranks, self.segments.work(causal, window))
            self._passages[key] = Passage(self, route(self.shards, shares, self.group.rank), causal, window)
        return self._passages[key]

    def mask(self, rows: range, keys: range, causal: bool, window: int | None) -> Mask:
        """What some rows see of the keys that any of them sees. Nothing is read from the device."""
        key = (rows, keys, causal, window)
        if key not in self._masks:
            tables = self._tables(rows, keys)
            if causal and self.known is not None and self.known.spans:
                ranges = self._key_ranges(window)[:, rows.start : rows.stop]
                self._masks[key] = Mask(*tables, (ranges - keys.start).clamp(0, len(keys)), False, None)
            else:
                self._masks[key] = Mask(*tables, None, causal, window)
        return self._masks[key]

    def _key_ranges(self, window: int | None) -> Tensor:
        """int32 (2, S), the keys that each row sees in layers with this window: see `ops.varlen_attention`."""
        if window not in self._ranges:
            segments, row = self.segments, torch.arange(self.shards.total)
            starts = torch.tensor(segments.starts)
            first, stop = starts[:-1].repeat_interleave(starts.diff()), row + 1
            if window is not None:
                first = first.maximum(row - window + 1)
            for span in segments.spans:
                stop[span.start : span.stop] = span.stop
                if not segments.cut_spans:
                    first[span.start : span.stop].clamp_(max=span.start)
            self._ranges[window] = torch.stack([first, stop]).to(self.cu_seqlens.device, torch.int32)
        return self._ranges[window]

    def _tables(self, rows: range, keys: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """cu_seqlens_q, cu_seqlens_k and seqused_k of some rows and keys."""
        if len(rows) == len(keys) == self.shards.total:
            return self.cu_seqlens, self.cu_seqlens, self.seqused_k
        touched = self.segments.within(rows)
        bounds = self.cu_seqlens[touched.start : touched.stop + 1]
        cu_q, cu_k = ((bounds - part.start).clamp(0, len(part)) for part in (rows, keys))
        if self.seqused_k is None:
            return cu_q, cu_k, None
        return cu_q, cu_k, self.seqused_k[touched.start : touched.stop].minimum(cu_k.diff())


class Passage:
    """A route with its tables on the device, and the mask of each of its items."""

    def __init__(self, stream: Stream, way: Route, causal: bool, window: int | None) -> None:
        self.route = way
        device = stream.cu_seqlens.device
        self.inputs, self.arrivals, self.outputs, self.results = (
            packing.box_table(leg.boxes, device) for leg in (way.inputs, way.arrivals, way.outputs, way.results)
        )
        self.masks = [stream.mask(item.rows, item.keys, causal, window) for item in way.share]


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
    scale: float | None = None,
) -> Tensor:
    """Attention over the whole stream from this rank's tokens: two exchanges, a fair share of the heads each; no
    exchange where shards end with segments.

    Args:
        q_THD, k_TKD, v_TKD: this rank's tokens, all heads; position embeddings applied.

    Returns:
        (T, H, D), this rank's tokens, all heads.
    """
    attend = partial(ops.varlen_attention, softcap=softcap, scale=scale)
    if stream.is_local:
        own = stream.shards.range(stream.group.rank)
        return attend(q_THD, k_TKD, v_TKD, **stream.mask(own, own, causal, window)._asdict())
    count = chunks(stream.chunks, q_THD.shape[1], k_TKD.shape[1], stream.group.size)
    parts = list(zip(*(x.chunk(count, 1) for x in (q_THD, k_TKD, v_TKD)), strict=True))
    passages = [stream.passage(q.shape[1], k.shape[1], causal, window) for q, k, _ in parts]

    outs: list[Callable[[], Tensor]] = []
    arriving = _send(parts[0], passages[0], stream.group)
    for index, passage in enumerate(passages):
        arrived = arriving
        if index + 1 < count:  # travels while this one is attended to
            arriving = _send(parts[index + 1], passages[index + 1], stream.group)
        outs.append(_attend(arrived(), passage, stream.group, attend))
    results = [
        packing.unpack(out(), passage.results, [(q.shape[0], q.shape[1])])[0]
        for out, passage, (q, _, _) in zip(outs, passages, parts, strict=True)
    ]
    return results[0] if count == 1 else torch.cat(results, 1)


def chunks(wanted: int, num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """In how many chunks of heads a layer is done: at most as many as wanted, each of whole heads for all ranks.

    >>> chunks(4, 16, 16, 2), chunks(3, 16, 16, 2), chunks(4, 28, 4, 4)
    (4, 2, 1)
    """
    fit = [n for n in range(2, wanted + 1) if num_kv_heads % n == 0 and num_kv_heads // n % ranks == 0]
    return max(fit, default=1)


def _send(states: tuple[Tensor, ...], passage: Passage, group: Group) -> Callable[[], Tensor]:
    """pack and the first exchange."""
    route = passage.route
    packed = packing.pack(states, passage.inputs, sum(route.inputs.sizes))
    return comm.begin_exchange(packed, route.inputs.sizes, route.arrivals.sizes, group)


def _attend(received: Tensor, passage: Passage, group: Group, attend: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """attend and the second exchange."""
    route = passage.route
    outs = [
        attend(q, k, v, **mask._asdict())
        for (q, k, v), mask in zip(_items(received, passage), passage.masks, strict=True)
    ]
    return comm.begin_exchange(_join(outs, received, passage), route.outputs.sizes, route.results.sizes, group)


def _items(received: Tensor, passage: Passage) -> list[list[Tensor]]:
    """q, k and v of each item. Sources arrive in rank order and shards are contiguous, so that a buffer for one item of
    whole heads already is its stream in order, and is only viewed."""
    share = passage.route.share
    if passage.route.in_place:
        (item,) = share
        packed = received.unflatten(0, (len(item.rows), -1))
        return [list(packed.split([len(item.q), len(item.kv), len(item.kv)], 1))]
    shapes = [
        shape
        for item in share
        for shape in ((len(item.rows), len(item.q)), (len(item.keys), len(item.kv)), (len(item.keys), len(item.kv)))
    ]
    parts = packing.unpack(received, passage.arrivals, shapes)
    return [parts[i : i + 3] for i in range(0, len(parts), 3)]


def _join(outs: list[Tensor], received: Tensor, passage: Passage) -> Tensor:
    """The items' outputs as the send buffer: one item's already is."""
    if not outs:  # a rank without work sends nothing, but must take part in the backward
        return received[:0]
    if len(outs) == 1:
        return outs[0].flatten(0, 1)
    return packing.pack(outs, passage.outputs, sum(passage.route.outputs.sizes))


def gather(x: Tensor, stream: Stream, unit: int = 1) -> Tensor:
    """The whole stream from this rank's tokens (dim 0), `unit` of which have become one row."""
    return comm.gather(x, stream.shards.merged(unit), stream.group)


def reshard(x: Tensor, source: Shards, target: Shards, group: Group, index: Tensor | None = None) -> Tensor:
    """This rank's rows (dim 0) of a stream under another cut: each row goes from its owner to its next one, once.

    Args:
        index: (S,) int64 on the CPU, where the target's order is another than the source's: row i of the source is row
            `index[i]` of the target.
    """
    own = source.range(group.rank)
    if index is None:
        return x if source == target else comm.exchange(x, *moves(source, target, group.rank), group)
    senders, wanted = torch.tensor(source.sizes), target.range(group.rank)
    owner = torch.arange(group.size).repeat_interleave(senders)  # of each row, in the source's order
    goal = torch.arange(group.size).repeat_interleave(torch.tensor(target.sizes))[index]
    # Each rank sends its rows in the order of the target, so that only the senders have to be merged on arrival.
    mine = index[own.start : own.stop]
    arriving = ((index >= wanted.start) & (index < wanted.stop)).nonzero().flatten()
    arriving = arriving[torch.argsort(owner[arriving] * max(source.total, 1) + index[arriving])]
    receive = torch.bincount(owner[arriving], minlength=group.size).tolist()
    send = torch.bincount(goal[own.start : own.stop], minlength=group.size).tolist()
    arrived = comm.exchange(x[torch.argsort(mine).to(x.device)], send, receive, group)
    return arrived[torch.argsort(index[arriving]).to(x.device)]
