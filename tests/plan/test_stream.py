"""The masks of what each rank attends to, held to the keys that a row sees by definition; what a stream remembers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import counts, masks, seen, streams

from triton_sp.kernels.mask import Mask
from triton_sp.plan.heads import HeadTask
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.plan.stream import Stream, chunks
from triton_sp.ranks.groups import Group


def visible(mask: Mask, row: int, segment: int, q: tuple[int, int], k: tuple[int, int]) -> range:
    """The keys that a row of a segment sees, as the kernels read a mask."""
    used = mask.seqused_k
    stop = k[0] + (k[1] - k[0] if used is None else int(used[segment]))
    if mask.key_ranges is not None:
        low, high = mask.key_ranges[:, row].tolist()
        return range(max(low, k[0]), min(high, stop))
    position = row - q[1] + stop  # the last row is aligned with the last key that counts
    low = k[0] if mask.window is None else position - mask.window + 1
    high = position + 1 if mask.causal else stop if mask.window is None else position + mask.window
    return range(max(low, k[0]), min(high, stop))


def assert_right(mask: Mask, task: HeadTask, segments: Segments, used: list[int], kind: tuple[bool, int | None]):
    """The mask of a task says of each of its rows what it sees."""
    q, k, _, _ = mask.tables
    bounds = list(zip(pairwise(q.tolist()), pairwise(k.tolist()), strict=True))
    assert bounds[0][0][0] == 0 and bounds[-1][0][1] == len(task.rows)
    for segment, ((first, stop), keys) in enumerate(bounds):
        for row in range(first, stop):
            found = visible(mask, row, segment, (first, stop), keys)
            wanted = seen(segments, row + task.rows.start, *kind)
            if not used[segments.at(row + task.rows.start)]:
                wanted = range(0)
            assert [key + task.keys.start for key in found] == list(wanted)


def longest(segments: Segments, part: range) -> int:
    return max((len(range(max(a, part.start), min(b, part.stop))) for a, b in pairwise(segments.starts)), default=0)


@settings(deadline=None)
@given(streams(), masks, counts, st.integers(1, 5), st.booleans(), st.booleans())
def test_masks_of_all_ranks_say_what_rows_see(segments, kind, heads, ranks, on_device, padded) -> None:
    """Also where the host does not know the segments, and where some padding counts as no key."""
    total, lengths = segments.starts[-1], [stop - start for start, stop in pairwise(segments.starts)]
    used = [0 if padded and length == 1 else length for length in lengths]
    table, shards = torch.tensor(segments.starts, dtype=torch.int32), shard_tokens(total, ranks)
    for rank in range(ranks):
        known = None if on_device and not segments.spans else segments
        seqused = torch.tensor(used, dtype=torch.int32) if padded else None
        stream = Stream(Group("", rank, ranks), shards, table, seqused, known)
        assert stream.segments == segments or known is None
        way = stream.route(*heads, *kind)
        for task, mask in zip(way.tasks, way.masks, strict=True):
            if not task.rows:
                continue
            assert_right(mask, task, segments, used, kind)
            if known is None or mask.key_ranges is not None:
                assert mask.max_seqlens is None
            else:
                assert mask.max_seqlens == (longest(segments, task.rows), longest(segments, task.keys))
            assert stream.mask(task.rows, task.keys, *kind) is mask
        assert stream.route(*heads, *kind) is way and stream.route(*heads, True, 9) is not way


LOCAL = [(1, (8,), "heads"), (1, (8,), "segments"), (2, (3, 5), "segments")]
SHARED = [(2, (4, 4), "segments"), (2, (3, 5), "heads"), (3, (3, 4, 1), "segments")]


@pytest.mark.parametrize(("ranks", "sizes", "plan"), LOCAL + SHARED)
def test_nothing_is_exchanged_where_no_segment_is_shared(ranks: int, sizes: tuple[int, ...], plan) -> None:
    stream = Stream(Group("", ranks - 1, ranks), Shards(sizes), torch.tensor([0, 3, 8]), plan=plan)
    assert stream.is_local is ((ranks, sizes, plan) in LOCAL)
    assert stream.own == range(8 - sizes[-1], 8) and stream.local == slice(8 - sizes[-1], 8)
    assert stream.segments == Segments((0, 3, 8)) and stream.segments is stream.segments
    if stream.is_local:
        assert stream.describe() == "no exchange"
        return
    stream.route(6, 6, True, None)
    stream.route(6, 6, False, None)
    heads = "heads 3-5" if ranks == 2 else "heads 4-5"
    assert stream.describe() == heads
    stream.route(2 * ranks, ranks, True, None)
    assert stream.describe() == " or ".join(sorted({heads, f"heads {2 * ranks - 2}-{2 * ranks - 1}"}))


@given(st.integers(1, 6), st.integers(1, 24), st.integers(1, 4), st.integers(1, 4))
def test_chunks_are_the_most_that_divide(wanted: int, kv_heads: int, share: int, ranks: int) -> None:
    found = chunks(wanted, kv_heads * share, kv_heads, ranks)
    possible = [n for n in range(1, wanted + 1) if n == 1 or kv_heads % (n * ranks) == 0]
    assert found == max(possible)
