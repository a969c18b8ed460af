"""Laws of the shares and routes: who attends with which heads and rows, and what travels for it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sp.ops import pack
from triton_sp.plan.boxes import Route, route
from triton_sp.plan.heads import HeadTask, Tasks, assign_heads, assign_whole_heads
from triton_sp.plan.segments import Segments, Work
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import ALONE

COUNTS = [(25, 25), (28, 4), (14, 2), (9, 3), (40, 8), (5, 1)]  # query and key/value heads
RANKS = [2, 3, 4, 6, 8, 16]


def segments_of(lengths: list[int]) -> Segments:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return Segments(tuple(starts))


@st.composite
def streams(draw: st.DrawFn) -> Segments:
    """Segments of any lengths, some with spans in which tokens see one another, side by side and apart."""
    segments = segments_of(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)))
    spans = []
    for start, stop in pairwise(segments.starts):
        cuts = draw(st.lists(st.integers(start, stop), max_size=6, unique=True).map(sorted))
        spans += [range(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    return replace(segments, spans=tuple(spans), cut_spans=draw(st.booleans()))


def seen(segments: Segments, row: int, causal: bool, window: int | None) -> range:
    """The keys that a row sees, by definition."""
    segment = max(i for i, start in enumerate(segments.starts[:-1]) if start <= row)
    first, stop = segments.starts[segment], segments.starts[segment + 1]
    if not causal:
        return range(first, stop)
    span = next((span for span in segments.spans if row in span), range(row, row + 1))
    first = max(first, row + 1 - window) if window else first
    return range(first if segments.cut_spans else min(first, span.start), span.stop)


def load(share: Tasks, work: Work) -> int:
    return sum(len(item.q) * (work.before(item.rows.stop) - work.before(item.rows.start)) for item in share)


masks = st.sampled_from([(False, None), (True, None), (True, 1), (True, 7)])
counts = st.tuples(st.integers(1, 7), st.integers(1, 5)).map(lambda pair: (pair[0] * pair[1], pair[1]))


@settings(deadline=None)
@given(streams(), masks)
def test_work_counts_the_keys_of_rows(segments: Segments, mask: tuple[bool, int | None]) -> None:
    work = segments.work(*mask)
    pairs = [len(seen(segments, row, *mask)) for row in range(segments.starts[-1])]
    assert [work.before(row) for row in range(len(pairs) + 1)] == [sum(pairs[:row]) for row in range(len(pairs) + 1)]
    for target in range(work.total + 1):
        row = work.row_at(target)
        assert work.before(row) >= target and (row == 0 or work.before(row - 1) < target)


@settings(deadline=None)
@given(streams(), masks, counts, st.integers(1, 9))
def test_every_row_of_every_head_is_owned_once(segments, mask, heads, ranks) -> None:
    work, total = segments.work(*mask), segments.starts[-1]
    shares = assign_heads(*heads, ranks, work)
    owned = sorted((h, row) for share in shares for item in share for h in item.q for row in item.rows)
    assert owned == [(h, row) for h in range(heads[0]) for row in range(total)]
    assert sum(load(share, work) for share in shares) == heads[0] * work.total
    widest = max(len(seen(segments, row, *mask)) for row in range(total))
    if assign_whole_heads(*heads, ranks, total) is None:
        assert (
            max(load(share, work) for share in shares) <= heads[0] * work.total / ranks + widest * heads[0] / heads[1]
        )
    for share in shares:
        for item in share:
            assert {h * heads[1] // heads[0] for h in item.q} == set(item.kv)
            assert len(item.q) % len(item.kv) == 0  # one call can attend with them
            needed = {key for row in item.rows for key in seen(segments, row, *mask)}
            assert needed == set(item.keys)  # none less, and none more


@settings(deadline=None)
@given(streams(), st.sampled_from([None, 1, 7]), counts, st.integers(1, 9))
def test_masks_say_what_rows_see(segments, window, heads, ranks) -> None:
    total = segments.starts[-1]
    table = torch.tensor(segments.starts, dtype=torch.int32)
    stream = Stream(ALONE, Shards((total,)), table, host_segments=segments)
    for item in chain(*assign_heads(*heads, ranks, segments.work(True, window))):
        mask = stream.mask(item.rows, item.keys, True, window)
        if not segments.spans:
            assert mask.key_ranges is None and (mask.causal, mask.window) == (True, window)
            continue
        wanted = [seen(segments, row, True, window) for row in item.rows]
        assert mask.key_ranges is not None and not mask.causal and mask.window is None
        assert (mask.key_ranges + item.keys.start).T.tolist() == [[keys.start, keys.stop] for keys in wanted]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("heads", COUNTS)
def test_the_busiest_rank_has_at_most_1_05_of_the_mean(heads: tuple[int, int], ranks: int, causal: bool) -> None:
    generator = random.Random(0)
    for lengths in ([1024], [4096], [generator.randint(1, 900) for _ in range(9)]):
        work = segments_of(lengths).work(causal)
        loads = [load(share, work) for share in assign_heads(*heads, ranks, work)]
        assert max(loads) <= 1.05 * heads[0] * work.total / ranks, (lengths, max(loads) * ranks / heads[0] / work.total)


def buffers(xs: list[torch.Tensor], leg, ranks: int) -> list[torch.Tensor]:
    """The send buffer cut by rank."""
    if not xs:
        return [torch.empty(0, 1)] * ranks
    return list(pack.pack_boxes(xs, pack.box_table(leg.boxes, xs[0].device), sum(leg.sizes)).split(leg.sizes))


def unpacked(parts: list[torch.Tensor], leg, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    assert tuple(len(part) for part in parts) == leg.sizes
    flat = torch.cat(parts)
    ys = [flat.new_empty(*shape, flat.shape[-1]) for shape in shapes]
    if ys:
        pack.unpack_boxes(flat, pack.box_table(leg.boxes, flat.device), ys)
    return ys


def shapes_of(way: Route) -> list[tuple[int, int]]:
    return [s for item in way.tasks for s in [(len(item.rows), len(item.q))] + [(len(item.keys), len(item.kv))] * 2]


@settings(max_examples=60, deadline=None)
@given(streams(), masks, counts, st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_is_sent_is_what_items_need(segments, mask, heads, ranks, generator) -> None:
    """Both exchanges of all ranks in one process: the items get their rows of q, k and v, and every rank gets its
    tokens' outputs back, bit for bit."""
    total = segments.starts[-1]
    shares = assign_heads(*heads, ranks, segments.work(*mask))
    shards = shard_tokens(total, ranks)
    if generator.random() < 0.5:  # shards of any size, empty ones too
        cuts = sorted(generator.randint(0, total) for _ in range(ranks - 1))
        shards = Shards(tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)))
    ways = [route(shards, shares, rank) for rank in range(ranks)]
    q, k, v = (torch.randn(total, count, 1) for count in (heads[0], heads[1], heads[1]))
    local = [[x[shards.starts[r] :][: shards.sizes[r]] for x in (q, k, v)] for r in range(ranks)]

    sent = [buffers(local[r], ways[r].inputs, ranks) for r in range(ranks)]
    items = [
        unpacked([sent[src][r] for src in range(ranks)], ways[r].arrivals, shapes_of(ways[r])) for r in range(ranks)
    ]
    for way, parts in zip(ways, items, strict=True):
        for index, item in enumerate(way.tasks):
            rows, keys = slice(item.rows.start, item.rows.stop), slice(item.keys.start, item.keys.stop)
            kv = slice(item.kv.start, item.kv.stop)
            assert torch.equal(parts[3 * index], q[rows, item.q.start : item.q.stop])
            assert torch.equal(parts[3 * index + 1], k[keys, kv])
            assert torch.equal(parts[3 * index + 2], v[keys, kv])

    back = [buffers(items[r][::3], ways[r].outputs, ranks) for r in range(ranks)]
    for r in range(ranks):
        (out,) = unpacked([back[src][r] for src in range(ranks)], ways[r].results, [(shards.sizes[r], heads[0])])
        assert torch.equal(out, local[r][0])


def test_queries_and_keys_of_the_same_tokens_travel_side_by_side() -> None:
    task = HeadTask(range(2), range(1), range(2, 900), range(2, 900))
    assert task.side_by_side
    for rows, keys in ((range(3, 900), task.keys), (task.rows, range(2, 901))):
        assert not replace(task, rows=rows, keys=keys).side_by_side


def test_whole_heads_arrive_as_a_stream() -> None:
    """What one item of whole heads receives can be viewed as (S, q + k + v heads, D): nothing is copied."""
    way = route(shard_tokens(7, 2), assign_heads(4, 2, 2, Segments((0, 7)).work()), 1)
    assert way.in_place
    assert [(box.start, box.stride) for box in way.arrivals.boxes] == [
        (0, 4),
        (2, 4),
        (3, 4),
        (16, 4),
        (18, 4),
        (19, 4),
    ]
