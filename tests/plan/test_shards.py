"""Shards, and what travels between two ways to cut a stream, counted token by token."""

from __future__ import annotations

from itertools import product

import pytest

from triton_sp.plan.shards import Shards, moves, overlap, shard_tokens


def owners(shards: Shards) -> list[int]:
    """The rank of every token."""
    return [rank for rank, size in enumerate(shards.sizes) for _ in range(size)]


@pytest.mark.parametrize("sizes", [(), (5,), (3, 0, 2), (0, 4), (2, 1, 0)])
def test_parts_follow_one_another(sizes: tuple[int, ...]) -> None:
    shards = Shards(sizes)
    own = owners(shards)
    assert shards.total == len(own) and len(shards.starts) == len(sizes)
    for rank, size in enumerate(sizes):
        assert list(shards.range(rank)) == [token for token, owner in enumerate(own) if owner == rank]
        assert len(shards.range(rank)) == size and shards.range(rank).start == shards.starts[rank]


def test_neighbours_become_one() -> None:
    assert repr(Shards((4, 0, 6)).merged(2).sizes) == "(2, 0, 3)" and Shards((3, 6)).merged(3).sizes == (1, 2)
    for sizes in ((4, 3), (1, 4), (1, 1)):
        with pytest.raises(AssertionError):
            Shards(sizes).merged(2)


def test_every_token_moves_once() -> None:
    cuts = [Shards(sizes) for sizes in product(range(4), repeat=3) if sum(sizes) == 3]
    for source, target in product(cuts, cuts):
        pairs = list(zip(owners(source), owners(target), strict=True))
        for rank in range(3):
            send, receive = moves(source, target, rank)
            assert send == [pairs.count((rank, other)) for other in range(3)]
            assert receive == [pairs.count((other, rank)) for other in range(3)]
    for total in (4, 6):
        with pytest.raises(AssertionError):
            moves(Shards((2, 3)), Shards((1, total - 1)), 0)


def test_what_parts_have_in_common() -> None:
    parts = [range(a, b) for a in range(5) for b in range(a, 5)]
    for a, b in product(parts, parts):
        found = overlap(a, b)
        assert list(found) == sorted(set(a) & set(b))
        assert found.start == max(a.start, b.start) and found.stop >= found.start


@pytest.mark.parametrize("unit", [1, 2, 3])
def test_tokens_are_cut_as_equally_as_units_allow(unit: int) -> None:
    for count, ranks in product(range(12), range(1, 6)):
        sizes = shard_tokens(count * unit, ranks, unit).sizes
        assert sizes == tuple(unit * (count // ranks + (rank < count % ranks)) for rank in range(ranks))
        for off in range(1, unit):
            with pytest.raises(AssertionError):
                shard_tokens(count * unit + off, ranks, unit)
