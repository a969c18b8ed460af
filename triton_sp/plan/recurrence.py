"""What recurrent layers send one another: the tokens that a convolution looks back to, the states that go from part to
part, and which of two ways of sharing out a recurrence is the faster. Pure Python over sizes that every rank knows.

states     each rank runs its own tokens and hands the state on: what travels does not depend on the number of tokens
heads      tokens are traded for heads, as in attention: each rank runs all tokens of some heads

Nothing passes from one segment (row, packed document) to the next: where segments end on their ranks nothing travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triton_sp.plan.cost import Link
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards, overlap, shard_tokens

Method = Literal["states", "heads", "local"]
_CHUNK = 64  # tokens that the rules compute at once, in products of (chunk, chunk)


@dataclass(frozen=True)
class Carry:
    """How the tokens of a rank hang together with those of others, along segments that lie on several ranks.

    Attributes:
        pieces: the tokens of each segment in the rank's part, counted from its beginning.
        senders: the ranks before it, in order, that have tokens of the segment which its first token continues.
        receivers: the ranks behind it that continue the segment of its last token.
        crosses: whether any segment lies on several ranks.
    """

    pieces: tuple[range, ...]
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    crosses: bool


def carry(shards: Shards, segments: Segments, rank: int) -> Carry:
    """How a rank's part of a stream hangs together with the others'.

    >>> parts = [carry(Shards((4, 0, 1, 3)), Segments((0, 2, 8)), rank) for rank in range(4)]
    >>> [part.pieces for part in parts]
    [(range(0, 2), range(2, 4)), (), (range(0, 1),), (range(0, 3),)]
    >>> [part.senders for part in parts], [part.receivers for part in parts]
    ([(), (), (0,), (0, 2)], [(2, 3), (), (3,), ()])
    """
    parts = [shards.range(other) for other in range(len(shards.sizes))]
    wanted = [_before(segments, part, shards.total) for part in parts]
    return Carry(
        tuple(pieces(segments, parts[rank])),
        tuple(other for other, part in enumerate(parts) if overlap(part, wanted[rank])),
        tuple(other for other, before in enumerate(wanted) if overlap(parts[rank], before)),
        any(wanted),
    )


def pieces(segments: Segments, own: range) -> list[range]:
    """The tokens of each segment in a part, counted from its beginning.

    >>> pieces(Segments((0, 3, 8, 9)), range(2, 9))
    [range(0, 1), range(1, 6), range(6, 7)]
    """
    starts = segments.starts
    return [
        range(max(starts[index], own.start) - own.start, min(starts[index + 1], own.stop) - own.start)
        for index in segments.within(own)
    ]


def _before(segments: Segments, own: range, reach: int) -> range:
    """The up to `reach` tokens before a part that are of the segment which its first token is of."""
    if not own:
        return range(0)
    return range(max(segments.starts[segments.at(own.start)], own.start - reach), own.start)


@dataclass(frozen=True)
class Halo:
    """The tokens that a causal convolution needs of the ranks before.

    Attributes:
        sends: for each rank the rows of this rank's part, counted from its beginning, that it gets.
        receives: how many rows come from each rank.
        needed: whether any rank needs any.
    """

    sends: tuple[range, ...]
    receives: tuple[int, ...]
    needed: bool


def halo(shards: Shards, segments: Segments, rank: int, reach: int) -> Halo:
    """What a rank sends and gets where a token looks `reach` tokens back, which may lie on several ranks.

    >>> halo(Shards((4, 1, 3)), Segments((0, 8)), rank=0, reach=2)
    Halo(sends=(range(0, 0), range(2, 4), range(3, 4)), receives=(0, 0, 0), needed=True)
    >>> halo(Shards((4, 1, 3)), Segments((0, 8)), rank=2, reach=2).receives
    (1, 1, 0)
    """
    own = shards.range(rank)
    parts = [shards.range(other) for other in range(len(shards.sizes))]
    wanted = [_before(segments, part, reach) for part in parts]
    sends = []
    for rows in wanted:
        part = overlap(own, rows)
        sends.append(range(part.start - own.start, part.stop - own.start) if part else range(0))
    receives = tuple(len(overlap(part, wanted[rank])) for part in parts)
    return Halo(tuple(sends), receives, any(wanted))


def heads_of_ranks(heads: int, groups: int, ranks: int) -> tuple[range, ...]:
    """Heads as even as possible, whole groups (heads that share a key) where there is one for every rank.

    >>> heads_of_ranks(8, 4, 3), heads_of_ranks(6, 2, 3)
    ((range(0, 4), range(4, 6), range(6, 8)), (range(0, 2), range(2, 4), range(4, 6)))
    """
    together = heads // groups if groups >= ranks else 1
    parts = shard_tokens(heads, ranks, together)
    return tuple(parts.range(rank) for rank in range(ranks))


def groups_of(heads: range, per_group: int) -> list[int]:
    """The group of each of some heads, or each group once where the heads are whole groups or of one group.

    >>> groups_of(range(2, 6), 2), groups_of(range(2, 4), 4), groups_of(range(1, 4), 2)
    ([1, 2], [0], [0, 1, 1])
    """
    every = [head // per_group for head in heads]
    once = sorted(set(every))
    return once if len(once) == 1 or len(heads) == per_group * len(once) else every


@dataclass(frozen=True)
class Shape:
    """A recurrence: heads, groups of heads that share a key, key and value channels of a head, the bytes of a token in
    all that the rule reads and writes, and the columns of what a part does to a state."""

    heads: int
    groups: int
    keys: int
    values: int
    token_bytes: int
    mixed: int

    def flops(self, values: int) -> float:
        """Of a token of one head, forward and backward (twice that), with so many value channels."""
        return 3.0 * (4 * self.keys * values + 2 * _CHUNK * (2 * self.keys + values))


def choose_method(shards: Shards, crosses: bool, shape: Shape, link: Link, forced: str) -> Method:
    """The faster method by the model of a link; "local" where no segment crosses from rank to rank.

    By states a rule runs with so many more value channels as there are columns in what a part does to a state.

    >>> from triton_sp.plan.cost import LINKS
    >>> shape = Shape(heads=32, groups=16, keys=128, values=128, token_bytes=2 * 128 * 96, mixed=128)
    >>> [choose_method(Shards((n,) * 4), True, shape, LINKS["pcie"], "auto") for n in (8192, 64)]
    ['states', 'heads']
    """
    ranks = len(shards.sizes)
    if not crosses:
        return "local"
    if forced != "auto":
        return "states" if forced == "states" else "heads"
    longest = max(shards.sizes)
    most = max(map(len, heads_of_ranks(shape.heads, shape.groups, ranks)))
    state = 4.0 * shape.heads * shape.keys * (shape.mixed + shape.values)
    seconds: dict[Method, float] = {
        "states": longest * shape.heads * shape.flops(shape.values + shape.mixed) / link.compute
        + 2 * (link.latency + (ranks - 1) * state / link.bandwidth),
        "heads": shards.total * most * shape.flops(shape.values) / link.compute
        + 2 * (2 * link.latency + longest * shape.token_bytes * (ranks - 1) / ranks / link.bandwidth),
    }
    return min(seconds, key=lambda method: seconds[method])
