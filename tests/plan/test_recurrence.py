"""What recurrent layers hand on, held to a version that looks at every pair of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from triton_sp.plan.recurrence import carry
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
