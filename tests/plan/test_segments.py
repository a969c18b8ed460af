"""Segments and their cuts, worked out for all at once, held to versions that go through them one by one."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sp.plan.segments import Segments, shard_segments
from triton_sp.plan.shards import Shards


def fill(blocks: list[tuple[int, float]], ranks: int, capacity: float) -> list[int]:
    """Sizes of parts that are each filled up to a capacity, but leave a block for every rank that follows."""
    sizes, load = [0], 0.0
    for index, (size, cost) in enumerate(blocks):
        left = len(blocks) - index  # this one counted
        if sizes[-1] and (load + cost > capacity or left <= ranks - len(sizes)):
            sizes.append(0)
            load = 0.0
        sizes[-1] += size
        load += cost
    return sizes


def cut_one_by_one(segments: Segments, ranks: int, costs: list[int], unit: int) -> Shards | None:
    blocks: list[tuple[int, float]] = []
    size, cost = 0, 0.0
    for (start, stop), price in zip(pairwise(segments.starts), costs, strict=True):
        size, cost = size + stop - start, cost + price
        if size and stop % unit == 0:
            blocks.append((size, cost))
            size, cost = 0, 0.0
    if size or len(blocks) < ranks:
        return None
    low, high = max(cost for _, cost in blocks), sum(cost for _, cost in blocks)
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (low, middle) if len(fill(blocks, ranks, middle)) <= ranks else (middle, high)
    return Shards(tuple(fill(blocks, ranks, high * (1 + 1e-9))))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
)
def test_cuts_are_those_of_the_loop(entries: list[tuple[int, int]], ranks: int, unit: int) -> None:
    lengths = [length * (unit if index % 3 else 1) for index, (length, _) in enumerate(entries)]
    costs = [cost if length else 0 for length, (_, cost) in zip(lengths, entries, strict=True)]
    segments = Segments((0, *np.cumsum(lengths).tolist()))
    found = shard_segments(segments, ranks, costs, unit)
    assert found == cut_one_by_one(segments, ranks, costs, unit)
    assert found is None or (found.total == segments.starts[-1] and len(found.sizes) == ranks and segments.local(found))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.booleans(),
    st.none() | st.integers(1, 6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_work_is_the_pairs_counted(lengths, causal, window, cut_spans, generator) -> None:
    """Against every (row, key) pair of the mask, spans included."""
    segments = Segments((0, *np.cumsum(lengths).tolist()))
    spans, rows = [], [0] * segments.starts[-1]
    for start, stop in pairwise(segments.starts):
        if causal and stop - start > 3 and generator.random() < 0.6:
            first = generator.randint(start, stop - 2)
            spans.append(range(first, generator.randint(first + 2, stop)))
    segments = Segments(segments.starts, tuple(spans), cut_spans)
    for start, stop in pairwise(segments.starts):
        for row in range(start, stop):
            span = segments.span(row) if causal else range(row, row + 1)
            for key in range(start, stop):
                ahead, behind = key > row, row - key
                if causal:
                    near = window is None or behind < window
                    seen = key in span if ahead else near or (key in span and not cut_spans)
                    near_span = not cut_spans and window is not None and span.start - window < key <= row
                    seen = seen or (near_span and len(span) > 1 and row - key < window)
                else:
                    seen = True
                rows[row] += seen
    work = segments.work(causal, window if causal else None)
    if causal or window is None:
        assert [work.before(row) for row in range(len(rows) + 1)] == [0, *np.cumsum(rows).tolist()]
        totals = [sum(rows[a:b]) for a, b in pairwise(segments.starts)]
        assert work.by_segment.tolist() == totals and work.total == sum(totals)
    for target in range(work.total + 2):
        assert work.row_at(target) == bisect_left(range(len(rows)), target, key=work.before)
