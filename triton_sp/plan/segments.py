"""Which tokens of a stream attend to one another, and how much work that is; cuts that leave segments whole.

Pure Python over sizes that every rank knows, like shards.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from triton_sp.plan.shards import Shards


@dataclass(frozen=True)
class Segments:
    """The segments of a stream, as `cu_seqlens` has them: where each starts, and the end of the last.

    Attributes:
        spans: runs of tokens inside a segment that see all of one another although attention is causal (an image, a
            prefix), in order. Tokens outside of them see what is before them.
        cut_spans: whether a sliding window ends inside spans too (Gemma 3), or only between them (PaliGemma 2).

    >>> segments = Segments((0, 3, 8))
    >>> segments.at(2), segments.at(3), segments.local(Shards((3, 5))), segments.local(Shards((4, 4)))
    (0, 1, True, False)
    """

    starts: tuple[int, ...]
    spans: tuple[range, ...] = ()
    cut_spans: bool = False

    def at(self, row: int) -> int:
        """The segment that a row belongs to."""
        return bisect_right(self.starts, row) - 1

    def span(self, row: int) -> range:
        """The run of tokens around a row that see one another: a row outside of `spans` is one by itself."""
        index = bisect_right(self.spans, row, key=lambda span: span.start) - 1
        return self.spans[index] if index >= 0 and row in self.spans[index] else range(row, row + 1)

    def within(self, rows: range) -> range:
        """The segments that have one of these rows."""
        return range(self.at(rows.start), self.at(rows.stop - 1) + 1) if rows else range(0)

    def local(self, shards: Shards) -> bool:
        """Whether every segment lies on one rank."""
        return all(start >= self.starts[-1] or self.starts[self.at(start)] == start for start in shards.starts)

    def work(self, causal: bool = False, window: int | None = None) -> Work:
        """How many keys the rows see; see Work."""
        ends = [0]
        for start, stop in pairwise(self.starts):
            ends.append(ends[-1] + _pairs(stop - start, stop - start, causal, window))
        mutual = [0]
        for span in self.spans if causal else ():
            mutual.append(mutual[-1] + _mutual_pairs(len(span), len(span), None if self.cut_spans else window))
        return Work(self, causal, window, tuple(ends), tuple(mutual))


def _pairs(rows: int, length: int, causal: bool, window: int | None) -> int:
    """(row, key) pairs of the first `rows` rows of a segment: the attention FLOPs of a head are 4 D times that."""
    if not causal:
        return rows * (length if window is None else min(length, 2 * window - 1))
    short = rows if window is None else min(rows, window)
    return short * (short + 1) // 2 + (rows - short) * (window or 0)


def _mutual_pairs(rows: int, length: int, window: int | None) -> int:
    """Pairs that a span adds to its first `rows` rows: the keys ahead, and those behind that the window left out."""
    behind = 0 if window is None else max(0, rows - window)
    return rows * (length - 1) - rows * (rows - 1) // 2 + behind * (behind + 1) // 2


@dataclass(frozen=True)
class Work:
    """The attention work of a stream, in (row, key) pairs of one head, and how much of it stands before each row.

    A row of a causal segment sees the keys up to its own, at most `window`, and its span. (Without causality a window
    counts as 2 window - 1 keys for every row, the ones at the edges of a segment too.)

    >>> work = Segments((0, 4, 6)).work(causal=True)
    >>> work.total, [work.before(row) for row in range(7)], work.row_at(6), work.row_at(7)
    (13, [0, 1, 3, 6, 10, 11, 13], 3, 4)
    """

    segments: Segments
    causal: bool
    window: int | None
    ends: tuple[int, ...]  # the work before each segment, and all of it; without what spans add
    mutual: tuple[int, ...]  # what spans add before each of them, and all of it

    @property
    def total(self) -> int:
        return self.ends[-1] + self.mutual[-1]

    @cached_property
    def by_segment(self) -> list[int]:
        """The work of each segment."""
        return [self.before(stop) - self.before(start) for start, stop in pairwise(self.segments.starts)]

    def before(self, row: int) -> int:
        starts = self.segments.starts
        if row >= starts[-1]:
            return self.total
        segment = self.segments.at(row)
        length = starts[segment + 1] - starts[segment]
        pairs = self.ends[segment] + _pairs(row - starts[segment], length, self.causal, self.window)
        return pairs + self._mutual_before(row)

    def _mutual_before(self, row: int) -> int:
        if len(self.mutual) == 1:
            return 0
        segments = self.segments
        index = bisect_left(segments.spans, row, key=lambda span: span.start)  # spans that start before the row
        if index == 0 or row >= segments.spans[index - 1].stop:
            return self.mutual[index]
        span, window = segments.spans[index - 1], None if segments.cut_spans else self.window
        return self.mutual[index - 1] + _mutual_pairs(row - span.start, len(span), window)

    def row_at(self, work: int) -> int:
        """The first row that at least `work` stands before."""
        return bisect_left(range(self.segments.starts[-1]), work, key=self.before)

    def keys(self, rows: range) -> range:
        """The keys that these rows see, from the first to the last."""
        starts = self.segments.starts
        first, last = self.segments.at(rows.start), self.segments.at(rows.stop - 1)
        if not self.causal:
            assert self.window is None
            return range(starts[first], starts[last + 1])
        start = max(starts[first], 0 if self.window is None else rows.start - self.window + 1)
        if not self.segments.cut_spans:
            start = min(start, self.segments.span(rows.start).start)
        return range(start, self.segments.span(rows.stop - 1).stop)


def shard_segments(segments: Segments, ranks: int, costs: Sequence[float], unit: int = 1) -> Shards | None:
    """Cut a stream where segments end, so that the costliest rank costs as little as possible and none is empty.

    Args:
        costs: of each segment.
        unit: cuts are at multiples of it.

    Returns:
        None where there are fewer places to cut than there must be.

    >>> shard_segments(Segments((0, 4, 8, 12, 24)), 2, [1, 1, 1, 3]).sizes
    (12, 12)
    """
    blocks: list[tuple[int, float]] = []  # segments between two places where a cut may be, as (tokens, cost)
    size, cost = 0, 0.0
    for (start, stop), price in zip(pairwise(segments.starts), costs, strict=True):
        size, cost = size + stop - start, cost + price
        if size and stop % unit == 0:
            blocks.append((size, cost))
            size, cost = 0, 0.0
    if size or len(blocks) < ranks:
        return None
    low, high = max(cost for _, cost in blocks), sum(cost for _, cost in blocks)
    for _ in range(32):  # the least capacity with which `ranks` parts are enough, to 1e-9 of the whole
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(blocks, ranks, middle)) <= ranks else (middle, high)
    return Shards(tuple(_fill(blocks, ranks, high * (1 + 1e-9))))


def _fill(blocks: list[tuple[int, float]], ranks: int, capacity: float) -> list[int]:
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
