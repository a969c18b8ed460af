"""What recurrent layers hand on, held to a version that looks at every pair of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sp.plan.cost import Link
from triton_sp.plan.recurrence import Shape, carry, choose_method, groups_of, halo, heads_of_ranks
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_states_go_to_every_rank_that_continues_a_segment(sizes: list[int], lengths: list[int]) -> None:
    sizes[-1] += max(0, sum(lengths) - sum(sizes))
    lengths[-1] += max(0, sum(sizes) - sum(lengths))
    shards, segments = Shards(tuple(sizes)), Segments((0, *np.cumsum(lengths).tolist()))
    own = [shards.range(rank) for rank in range(len(sizes))]
    sent = [
        [source for source in range(rank) if own[source] and segments.at(own[source][-1]) == segments.at(part.start)]
        if part
        else []
        for rank, part in enumerate(own)
    ]
    for rank, part in enumerate(own):
        found = carry(shards, segments, rank)
        assert list(found.senders) == sent[rank]
        assert list(found.receivers) == [other for other in range(len(sizes)) if rank in sent[other]]
        assert found.crosses == any(sent) and sum(map(len, found.pieces)) == len(part)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_a_convolution_gets_the_tokens_that_it_looks_back_to(sizes: list[int], lengths: list[int], reach: int) -> None:
    """Those of the same segment, at most so far before the first of a rank, each from its owner."""
    sizes[-1] += max(0, sum(lengths) - sum(sizes))
    lengths[-1] += max(0, sum(sizes) - sum(lengths))
    shards, segments = Shards(tuple(sizes)), Segments((0, *np.cumsum(lengths).tolist()))
    own = [shards.range(rank) for rank in range(len(sizes))]
    wanted = [
        [row for row in range(max(0, part.start - reach), part.start) if segments.at(row) == segments.at(part.start)]
        if part
        else []
        for part in own
    ]
    for rank, part in enumerate(own):
        found = halo(shards, segments, rank, reach)
        sent = [[part.start + row for row in rows] for rows in found.sends]
        assert sent == [[row for row in rows if row in part] for rows in wanted]
        assert list(found.receives) == [sum(row in other for row in wanted[rank]) for other in own]
        assert found.needed == any(wanted)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_heads_are_shared_out_with_their_groups(per_group: int, groups: int, ranks: int) -> None:
    parts = heads_of_ranks(per_group * groups, groups, ranks)
    assert [head for part in parts for head in part] == list(range(per_group * groups))
    whole = groups >= ranks
    sizes = [len(part) // (per_group if whole else 1) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and (not whole or all(len(part) % per_group == 0 for part in parts))


@pytest.mark.parametrize(
    ("heads", "per_group", "groups"),
    [(range(4), 2, [0, 1]), (range(1, 2), 2, [0]), (range(5, 8), 4, [1]), (range(3, 6), 2, [1, 2, 2]),
     (range(1, 3), 2, [0, 1]), (range(2, 4), 1, [2, 3])],
)  # fmt: skip
def test_each_group_is_read_once_where_it_can_be(heads: range, per_group: int, groups: list[int]) -> None:
    assert groups_of(heads, per_group) == groups


def seconds_by_hand(sizes: list[int], shape: Shape, link: Link) -> dict[str, float]:
    """The model of a recurrence: products of a chunk, states or tokens that travel, and latency of each exchange."""

    def rule(values: int) -> float:  # of a token of a head: into the state and out of it, and two products of a chunk
        state, chunk = 2 * 2 * shape.keys * values, 64 * 2 * (2 * shape.keys + values)
        return 3.0 * (state + chunk)  # the backward is twice the forward

    ranks, most = len(sizes), max(sizes)
    heads = max(len(part) for part in heads_of_ranks(shape.heads, shape.groups, ranks))
    state = 4 * shape.heads * shape.keys * (shape.values + shape.mixed)
    by_states = most * shape.heads * rule(shape.values + shape.mixed) / link.compute
    by_heads = sum(sizes) * heads * rule(shape.values) / link.compute
    share = most * shape.token_bytes * (ranks - 1) / ranks
    return {
        "states": by_states + 2 * link.latency + 2 * (ranks - 1) * state / link.bandwidth,
        "heads": by_heads + 4 * link.latency + 2 * share / link.bandwidth,
    }


@given(
    st.lists(st.integers(0, 400), min_size=2, max_size=6).filter(any),
    st.builds(Shape, st.sampled_from([4, 12]), st.sampled_from([1, 4]), *[st.integers(1, 64)] * 2, st.integers(1, 900),
              st.integers(0, 64)),
    st.floats(1e-6, 1e-2), st.floats(1e5, 1e9), st.floats(1e8, 1e11),
)  # fmt: skip
def test_the_faster_method_is_chosen(sizes: list[int], shape: Shape, latency: float, sent: float, done: float) -> None:
    link, shards = Link("x", latency, sent, done), Shards(tuple(sizes))
    seconds = seconds_by_hand(sizes, shape, link)
    if abs(seconds["states"] - seconds["heads"]) > 1e-9 * seconds["heads"]:
        assert choose_method(shards, True, shape, link, "auto") == min(seconds, key=seconds.__getitem__)
    assert choose_method(shards, False, shape, link, "heads") == "local"
    for forced, method in (("states", "states"), ("heads", "heads")):
        assert choose_method(shards, True, shape, link, forced) == method
