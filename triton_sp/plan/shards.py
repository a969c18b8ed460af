"""Which rank owns which tokens of a stream.

All of plan/ is plain Python over sizes that every rank knows. So every rank comes to the same answer without asking the
others. Shards are as equal as possible (`shard_tokens`), or they are cut where segments end (`shard_segments`), so that
attention inside of segments needs no exchange. heads.py decides which heads a rank computes, and cost.py which plan is
the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Shards:
    """The contiguous parts of a token stream, one for each rank in rank order. A part may be empty.

    Attributes:
        sizes: how many tokens each rank has.

    >>> shards = Shards((3, 3, 2))
    >>> shards.total, shards.starts, shards.range(2)
    (8, (0, 3, 6), range(6, 8))
    """

    sizes: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        """How many tokens the stream has."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The position in the stream of each rank's first token."""
        return tuple(accumulate(self.sizes[:-1], initial=0)) if self.sizes else ()

    def range(self, rank: int) -> range:
        """The positions in the stream of a rank's tokens."""
        return range(self.starts[rank], self.starts[rank] + self.sizes[rank])

    def merged(self, unit: int) -> Shards:
        """The shards of the stream in which every `unit` neighbouring tokens have become one."""
        assert all(size % unit == 0 for size in self.sizes), (self.sizes, unit)
        return Shards(tuple(size // unit for size in self.sizes))


def moves(source: Shards, target: Shards, rank: int) -> tuple[list[int], list[int]]:
    """How many rows a rank sends to each rank and gets from each, when a stream is cut anew from source to target.

    >>> moves(Shards((4, 4)), Shards((6, 2)), 0), moves(Shards((4, 4)), Shards((6, 2)), 1)
    (([4, 0], [4, 2]), ([2, 2], [0, 2]))
    """
    assert source.total == target.total, (source, target)
    ranks = range(len(source.sizes))
    send = [len(overlap(source.range(rank), target.range(other))) for other in ranks]
    receive = [len(overlap(source.range(other), target.range(rank))) for other in ranks]
    return send, receive


def overlap(a: range, b: range) -> range:
    """What two parts of a stream have in common; empty, and at the later start, if nothing.

    >>> overlap(range(0, 4), range(2, 9)), overlap(range(0, 4), range(6, 9))
    (range(2, 4), range(6, 6))
    """
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return range(start, stop if stop > start else start)


def shard_tokens(total: int, ranks: int, unit: int = 1) -> Shards:
    """Cut `total` tokens into `ranks` parts of as equal a size as cuts at multiples of `unit` allow.

    >>> shard_tokens(10, 4).sizes, shard_tokens(20, 3, unit=4).sizes, shard_tokens(1, 2).sizes
    ((3, 3, 2, 2), (8, 8, 4), (1, 0))
    """
    assert total % unit == 0, (total, unit)
    base, extra = divmod(total // unit, ranks)
    return Shards(tuple((base + (rank < extra)) * unit for rank in range(ranks)))
