"""What the ranks have attended to together, compared with the textbook, number by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sp.ops import exact
from triton_sp.plan.heads import assign_heads
from triton_sp.plan.stream import Stream, chunks
from triton_sp.ranks import collectives

_RESULT, _GRADIENTS = "its result", tuple(f"the gradient of its {name}" for name in ("queries", "keys", "values"))
_OF_QUERIES, _HEAD = (_RESULT, _GRADIENTS[0]), ("head", "key/value head")


class Attended(NamedTuple):
    """What attention is told beside its states: see `stages.attention`."""

    stream: Stream
    causal: bool
    window: int | None
    heads: tuple[int, int]  # of q, and of k and v
    formula: exact.Formula

    @property
    def mask(self) -> Any:
        """What all rows see of all keys."""
        every = range(self.stream.shards.total)
        return self.stream.mask(every, every, self.causal, self.window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> dict[str, exact.Bounded]:
        """The result of the whole stream."""
        return {_RESULT: exact.attend((q, k, v), self.mask, self.formula)}

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *_: Tensor) -> dict[str, exact.Bounded]:
        """The gradients of q, k and v, given that of the result."""
        return dict(zip(_GRADIENTS, exact.attend_backward((q, k, v), dout, self.mask, self.formula), strict=True))


def rows_of_all(own: Sequence[Tensor], stream: Stream, target: int) -> list[Tensor]:
    """The rows of all ranks on rank `target`, nothing on the others. Where each rank attends by itself to the whole
    stream, each has them."""
    if stream.group.size == 1:
        return list(own)
    here, sizes, rows = stream.group.rank == target, stream.shards.sizes, len(own[0])
    widths = [x.shape[1:].numel() for x in own]
    flat = torch.cat([x.reshape(rows, width) for x, width in zip(own, widths, strict=True)], 1)
    send = [rows * (rank == target) for rank in range(stream.group.size)]
    receive = sizes if here else [0] * len(sizes)
    arrived = collectives.finish(collectives.begin_all_to_all(flat, send, receive, stream.group))
    parts = arrived.split(widths, 1)
    return [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, own, strict=True)] if here else []


class Verdict(NamedTuple):
    """A comparison: the largest error in parts of its bound, and in words."""

    ratio: float
    text: str


def compare(name: str, found: Tensor, wanted: exact.Bounded, call: Attended) -> Verdict:
    """The largest error in parts of its bound, and what is wrong, marked by "! ", if it is more than 1."""
    if not found.numel():
        return Verdict(0.0, "no tokens")
    error = (found.to(wanted.exact.dtype) - wanted.exact).abs()
    ratio = torch.where(error == 0, 0.0, error / wanted.bound).nan_to_num(torch.inf)
    ratio = torch.where(wanted.exact.isfinite() & wanted.bound.isfinite(), ratio, 0.0)  # NaN in, NaN out
    largest, place = ratio.flatten().max(0)
    if largest <= 1:
        return Verdict(float(largest), f"{name} within {float(largest):.2g} of its bound")
    kind = int(name not in _OF_QUERIES)
    row, head, column = (int(i) for i in torch.unravel_index(place, ratio.shape))
    is_found, is_right, within = (float(x[row, head, column]) for x in (found, wanted.exact, wanted.bound))
    off = ratio > 1
    return Verdict(
        float(largest),
        f"! {name} is {is_found:.5g}, not {is_right:.5g} +- {within:.2g}, at token {row} in {_HEAD[kind]} {head}, "
        f"computed by {_who(call, row, head, kind)}; {int(off.sum())} of {off.numel()} numbers are off, all of them "
        f"in {_HEAD[kind]}s {off.any(2).any(0).nonzero().flatten().tolist()}",
    )


def _who(call: Attended, row: int, head: int, kind: int) -> str:
    """The ranks that have computed a row of a head of the queries (kind 0), or of the keys and values (1)."""
    stream, ranks = call.stream, range(call.stream.group.size)
    if stream.group.size == 1:
        return "this rank"
    if stream.is_local:
        return f"rank {next(rank for rank in ranks if row in stream.shards.range(rank))}"
    count = chunks(stream.chunks, *call.heads, len(ranks))
    per_chunk = call.heads[0] // count, call.heads[1] // count
    tasks = assign_heads(*per_chunk, len(ranks), stream.segments.work(call.causal, call.window))
    parts = ((rank, (task.q, task.kv)[kind], (task.rows, task.keys)[kind]) for rank in ranks for task in tasks[rank])
    own = sorted({rank for rank, heads, rows in parts if head % per_chunk[kind] in heads and row in rows})
    return f"rank{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
