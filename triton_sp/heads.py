"""Which heads a rank attends with, and what must travel for it. Pure Python, like plan.py.

A share is a tuple of items; an item is some key/value heads with their query heads, and a range of rows of the stream.
Whole heads where they divide; otherwise the rows of a key/value head and its queries are cut between ranks by work.
A Route is what one rank sends and receives so that it can compute its share, as boxes of rows x heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from triton_sp.plan import Shards, Work


@dataclass(frozen=True)
class Item:
    """Query heads, their key/value heads, the rows of the stream and the keys that these rows see."""

    q: range
    kv: range
    rows: range
    keys: range

    @property
    def whole(self) -> bool:
        """Whether queries, keys and values of the same tokens are needed: they then travel side by side."""
        return self.rows == self.keys


Share = tuple[Item, ...]


def describe_share(share: Share, rows: int) -> str:
    """A share in words; `rows` are those of the stream.

    >>> every, part = range(100), range(71)
    >>> describe_share((Item(range(0, 2), range(0, 2), every, every), Item(range(2, 3), range(2, 3), part, part)), 100)
    'heads 0-1, head 2 in rows 0-70'
    """
    parts = []
    for item in share:
        heads = f"head {item.q.start}" if len(item.q) == 1 else f"heads {item.q.start}-{item.q.stop - 1}"
        cut = "" if len(item.rows) == rows else f" in rows {item.rows.start}-{item.rows.stop - 1}"
        parts.append(heads + cut)
    return ", ".join(parts) or "no heads"


def share_whole_heads(num_heads: int, num_kv_heads: int, ranks: int, rows: int) -> tuple[Share, ...] | None:
    """The share of each rank, in rank order, in whole heads; None where these do not divide evenly.

    >>> shares = share_whole_heads(8, 2, 4, rows=100)
    >>> [(item.q, item.kv) for share in shares for item in share][:3]
    [(range(0, 2), range(0, 1)), (range(2, 4), range(0, 1)), (range(4, 6), range(1, 2))]
    >>> share_whole_heads(28, 4, 8, rows=100) is None
    True
    """
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        return None
    per_rank, group = num_heads // ranks, num_heads // num_kv_heads
    queries = [range(rank * per_rank, (rank + 1) * per_rank) for rank in range(ranks)]
    every = range(rows)
    return tuple((Item(q, range(q.start // group, (q.stop - 1) // group + 1), every, every),) for q in queries)


def share_heads(num_heads: int, num_kv_heads: int, ranks: int, work: Work) -> tuple[Share, ...]:
    """The share of each rank, in rank order: every (head, row) in exactly one, and equal work for all.

    The busiest rank has at most the mean work and that of one row of a key/value head's queries.

    >>> from triton_sp.plan import Segments
    >>> shares = share_heads(3, 3, 2, Segments((0, 100)).work(causal=True))
    >>> [(item.q, item.rows, item.keys) for item in shares[0]]
    [(range(0, 1), range(0, 100), range(0, 100)), (range(1, 2), range(0, 71), range(0, 71))]
    >>> [(item.q, item.rows, item.keys) for item in shares[1]]
    [(range(1, 2), range(71, 100), range(0, 100)), (range(2, 3), range(0, 100), range(0, 100))]
    """
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    rows, group = work.segments.starts[-1], num_heads // num_kv_heads
    whole = share_whole_heads(num_heads, num_kv_heads, ranks, rows)
    if whole is not None:
        return whole
    # All work in one line: key/value head after key/value head, row after row. Ranks get equal parts of it.
    cuts = []
    for rank in range(ranks + 1):
        head, rest = divmod(rank * num_kv_heads, ranks)
        cuts.append((head, work.row_at(-(-rest * work.total // ranks))))
    return tuple(
        tuple(
            Item(range(kv.start * group, kv.stop * group), kv, part, work.keys(part))
            for kv, part in _pieces(begin, end, range(rows))
        )
        for begin, end in pairwise(cuts)
    )


def _pieces(begin: tuple[int, int], end: tuple[int, int], everything: range) -> list[tuple[range, range]]:
    """What lies between two (head, row): the rest of a head, whole heads, the beginning of a head; what there is."""
    (head, row), (last_head, last_row) = begin, end
    if head == last_head:
        pieces = [(range(head, head + 1), range(row, last_row))]
    else:
        whole = head if row == 0 else head + 1
        pieces = [
            (range(head, whole), range(row, everything.stop)),
            (range(whole, last_head), everything),
            (range(last_head, last_head + 1), range(last_row)),
        ]
    return [(heads, rows) for heads, rows in pieces if heads and rows]


class Box(NamedTuple):
    """`rows` x `heads` vectors of one of several tensors, and where they stand in a flat buffer.

    Vector (row + r, head + h) of the tensor is vector `start + r * stride + h` of the buffer.
    """

    tensor: int
    row: int
    rows: int
    head: int
    heads: int
    start: int
    stride: int


class Leg(NamedTuple):
    """One buffer of an exchange: where its vectors belong, and how many of them each rank sends or gets."""

    boxes: tuple[Box, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """What one rank sends and gets in one layer.

    Attributes:
        share: the rank's own.
        inputs: this rank's (q, k, v) in the first send buffer.
        arrivals: the items' (q, k, v, q, k, v, ...) in the first receive buffer.
        outputs: the items' (out, out, ...) in the second send buffer.
        results: this rank's (out,) in the second receive buffer.
    """

    share: Share
    inputs: Leg
    arrivals: Leg
    outputs: Leg
    results: Leg

    @property
    def in_place(self) -> bool:
        """Whether the receive buffer already is one item's stream, token by token."""
        return len(self.share) == 1 and self.share[0].whole


def route(shards: Shards, shares: tuple[Share, ...], rank: int) -> Route:
    """The two exchanges of a layer as `rank` sees them.

    >>> from triton_sp.plan import Segments
    >>> way = route(Shards((1, 1)), share_heads(2, 2, 2, Segments((0, 2)).work()), rank=0)
    >>> way.inputs.sizes, way.arrivals.sizes, way.outputs.sizes, way.results.sizes
    ((3, 3), (3, 3), (1, 1), (1, 1))
    >>> way.inputs.boxes[3]  # the query of head 1 for rank 1
    Box(tensor=0, row=0, rows=1, head=1, heads=1, start=3, stride=3)
    """
    own, mine = shards.range(rank), shares[rank]
    others = [shards.range(other) for other in range(len(shares))]
    return Route(
        mine,
        _leg(_lay_inputs, [(share, own) for share in shares], own),
        _leg(_lay_inputs, [(mine, tokens) for tokens in others], None),
        _leg(_lay_outputs, [(mine, tokens) for tokens in others], None),
        _leg(_lay_outputs, [(share, own) for share in shares], own),
    )


class _Part(NamedTuple):
    """Some rows and heads of the stream's tensor number `tensor`, for an item, and their place in a rank's buffer."""

    item: int
    tensor: int
    rows: range  # that the tokens have of
    base: range  # all that the item needs
    heads: range
    start: int
    stride: int


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _lay_inputs(share: Share, tokens: range) -> tuple[list[_Part], int]:
    """q, k and v of some tokens for a share. Token by token where an item needs all three of the same tokens, so that
    what arrives from all ranks already is a stream."""
    parts, start = [], 0
    for index, item in enumerate(share):
        rows, keys = _overlap(item.rows, tokens), _overlap(item.keys, tokens)
        q, kv = len(item.q), len(item.kv)
        if item.whole:
            q_stride = kv_stride = q + 2 * kv
            kv_start, stop = start + q, start + len(rows) * q_stride
        else:
            q_stride, kv_stride = q, 2 * kv
            kv_start = start + len(rows) * q
            stop = kv_start + len(keys) * kv_stride
        parts += [
            _Part(index, 0, rows, item.rows, item.q, start, q_stride),
            _Part(index, 1, keys, item.keys, item.kv, kv_start, kv_stride),
            _Part(index, 2, keys, item.keys, item.kv, kv_start + kv, kv_stride),
        ]
        start = stop
    return parts, start


def _lay_outputs(share: Share, tokens: range) -> tuple[list[_Part], int]:
    """The outputs of a share for some tokens, item after item."""
    parts, start = [], 0
    for index, item in enumerate(share):
        rows, heads = _overlap(item.rows, tokens), len(item.q)
        parts.append(_Part(index, 0, rows, item.rows, item.q, start, heads))
        start += len(rows) * heads
    return parts, start


def _leg(
    lay: Callable[[Share, range], tuple[list[_Part], int]], ranks: list[tuple[Share, range]], own: range | None
) -> Leg:
    """Lay out what concerns each rank, rank after rank. With `own`, boxes are of the tensors of these tokens;
    otherwise of the items' tensors, numbered item by item."""
    boxes, sizes = [], []
    tensors = 3 if lay is _lay_inputs else 1
    for share, tokens in ranks:
        parts, size = lay(share, tokens)
        before = sum(sizes)
        for item, tensor, rows, base, heads, start, stride in parts:
            place = (before + start, stride)
            if rows and own is not None:
                boxes.append(Box(tensor, rows.start - own.start, len(rows), heads.start, len(heads), *place))
            elif rows:
                boxes.append(Box(tensors * item + tensor, rows.start - base.start, len(rows), 0, len(heads), *place))
        sizes.append(size)
    return Leg(tuple(boxes), tuple(sizes))
