"""Who owns which tokens and which heads. Pure Python over sizes that every rank knows, so the answer needs no
communication and is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from triton_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Shards:
    """The contiguous parts of a token stream, one per rank in rank order; a part may be empty.

    >>> shards = Shards((3, 3, 2))
    >>> shards.total, shards.starts, shards.range(2)
    (8, (0, 3, 6), range(6, 8))
    """

    sizes: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return tuple(sum(self.sizes[:rank]) for rank in range(len(self.sizes)))

    def range(self, rank: int) -> range:
        return range(self.starts[rank], self.starts[rank] + self.sizes[rank])

    def merged(self, unit: int) -> Shards:
        """The shards of the stream in which every `unit` neighbouring tokens have become one."""
        assert all(size % unit == 0 for size in self.sizes), (self.sizes, unit)
        return Shards(tuple(size // unit for size in self.sizes))


def shard_tokens(total: int, ranks: int, unit: int = 1) -> Shards:
    """Cut `total` tokens into `ranks` parts of as equal a size as cuts at multiples of `unit` allow.

    >>> shard_tokens(10, 4).sizes, shard_tokens(20, 3, unit=4).sizes, shard_tokens(1, 2).sizes
    ((3, 3, 2, 2), (8, 8, 4), (1, 0))
    """
    assert total % unit == 0, (total, unit)
    base, extra = divmod(total // unit, ranks)
    return Shards(tuple((base + (rank < extra)) * unit for rank in range(ranks)))


@dataclass(frozen=True)
class HeadShares:
    """The query heads, and the key/value heads these need, of each rank in rank order.

    A key/value head stands in the share of every rank that has one of its query heads.
    """

    q: tuple[range, ...]
    kv: tuple[range, ...]

    @property
    def num_heads(self) -> int:
        return self.q[-1].stop

    def packed(self, rank: int) -> int:
        """Heads in the send buffer for `rank`: its queries, keys and values."""
        return len(self.q[rank]) + 2 * len(self.kv[rank])


def share_heads(num_heads: int, num_kv_heads: int, ranks: int, field: str = "attention heads") -> HeadShares:
    """Give each rank the same number of query heads, and the key/value heads that go with them.

    Raises:
        UnsupportedModelError: `ranks` does not divide `num_heads`, or neither of `num_kv_heads` and `ranks` divides
            the other.

    >>> shares = share_heads(8, 2, 4)
    >>> shares.q, shares.kv
    ((range(0, 2), range(2, 4), range(4, 6), range(6, 8)), (range(0, 1), range(0, 1), range(1, 2), range(1, 2)))
    """
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads) or num_heads % num_kv_heads:
        raise UnsupportedModelError(
            field,
            expected=f"query heads that {ranks} ranks divide, and key/value heads that are a multiple or a divisor of it",
            found=f"{num_heads} query and {num_kv_heads} key/value heads",
            remedy="use a group whose size divides the head count",
        )
    per_rank, group = num_heads // ranks, num_heads // num_kv_heads
    q = tuple(range(rank * per_rank, (rank + 1) * per_rank) for rank in range(ranks))
    kv = tuple(range(heads.start // group, (heads.stop - 1) // group + 1) for heads in q)
    return HeadShares(q, kv)
