"""Which tokens of a stream attend to one another, how much work that is, and shards that keep segments whole."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isqrt
from typing import TypeVar

import numpy as np

from triton_sp.plan.shards import Shards


@dataclass(frozen=True)
class Segments:
    """The segments of a stream.

    Attributes:
        starts: where each segment starts, and at last where the stream ends: the values of `cu_seqlens`.
        spans: neighbouring tokens inside of a segment that all see one another although attention is causal, such as
            an image or a prefix, in order. Tokens outside of spans see what is before them.
        cut_spans: whether sliding windows end inside of spans too (Gemma 3), or only between them (PaliGemma 2).

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
        """The span that a row is in; a row outside of all spans is a span by itself."""
        index = bisect_right(self.spans, row, key=lambda span: span.start) - 1
        return self.spans[index] if index >= 0 and row in self.spans[index] else range(row, row + 1)

    def within(self, rows: range) -> range:
        """The numbers of the segments that contain one of these rows."""
        return range(self.at(rows.start), self.at(rows.stop - 1) + 1) if rows else range(0)

    def local(self, shards: Shards) -> bool:
        """Whether each segment lies completely on one rank."""
        return all(start >= self.starts[-1] or self.starts[self.at(start)] == start for start in shards.starts)

    @cached_property
    def table(self) -> np.ndarray:
        """`starts` as an array, for what is worked out of all segments at once."""
        return np.asarray(self.starts, dtype=np.int64)

    def work(self, causal: bool = False, window: int | None = None) -> Work:
        """The attention work of the stream, for a mask that is causal or not and has a window or not."""
        lengths = np.diff(self.table)
        spans = np.asarray([len(span) for span in self.spans if causal], dtype=np.int64)
        return Work(
            self,
            causal,
            window,
            _running_total(_pairs(lengths, lengths, causal, window)),
            _running_total(_mutual_pairs(spans, spans, None if self.cut_spans else window)),
        )


def _running_total(values: np.ndarray) -> np.ndarray:
    """What stands before each, and all of it."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])


Number = TypeVar("Number", int, np.ndarray)


def _pairs(rows: Number, length: Number, causal: bool, window: int | None) -> Number:
    """The (row, key) pairs of the first `rows` rows of a segment. The attention FLOPs of a head are 4 D times that."""
    if not causal:
        return rows * (length if window is None else _least(length, 2 * window - 1))
    short = rows if window is None else _least(rows, window)
    return short * (short + 1) // 2 + (rows - short) * (window or 0)


def _rows_for(pairs: int, length: int, causal: bool, window: int | None) -> int:
    """The least number of rows that have so many pairs: the inverse of `_pairs`, for at least one."""
    if not causal:
        return -(-pairs // _pairs(1, length, causal, window))
    short = length if window is None else min(length, window)  # rows that see all keys before them
    if pairs > _pairs(short, length, True, window):
        assert window is not None
        return short + -(-(pairs - _pairs(short, length, True, window)) // window)
    rows = (isqrt(8 * pairs - 7) - 1) // 2  # r (r + 1) / 2 >= pairs
    return rows if rows * (rows + 1) // 2 >= pairs else rows + 1


def _mutual_pairs(rows: Number, length: Number, window: int | None) -> Number:
    """The pairs that a span adds to its first `rows` rows: keys ahead, and keys behind that the window leaves out."""
    behind = rows * 0 if window is None else rows - _least(rows, window)
    return rows * (length - 1) - rows * (rows - 1) // 2 + behind * (behind + 1) // 2


def _least(value: Number, limit: int) -> Number:
    return np.minimum(value, limit) if isinstance(value, np.ndarray) else min(value, limit)


@dataclass(frozen=True, eq=False)
class Work:
    """The attention work of a stream, in (row, key) pairs of one head, and how much of it is before each row.

    In a causal segment a row sees the keys up to its own, at most `window` of them, and its span. (If attention is not
    causal, a window counts as 2 window - 1 keys for every row, also for rows near the ends of a segment.)

    >>> work = Segments((0, 4, 6)).work(causal=True)
    >>> work.total, [work.before(row) for row in range(7)], work.row_at(6), work.row_at(7)
    (13, [0, 1, 3, 6, 10, 11, 13], 3, 4)
    """

    segments: Segments
    causal: bool
    window: int | None
    ends: np.ndarray  # the work before each segment, and all of it; without what spans add
    mutual: np.ndarray  # what spans add before each of them, and all of it

    @property
    def total(self) -> int:
        """The work of the whole stream."""
        return int(self.ends[-1] + self.mutual[-1])

    @cached_property
    def by_segment(self) -> np.ndarray:
        """The work of each segment."""
        spans = np.asarray([span.start for span in self.segments.spans], dtype=np.int64)
        if len(self.mutual) == 1:
            return np.diff(self.ends)
        return np.diff(self.ends + self.mutual[np.searchsorted(spans, self.segments.table)])

    def before(self, row: int) -> int:
        """The work of all rows before this one."""
        starts = self.segments.starts
        if row >= starts[-1]:
            return self.total
        segment = self.segments.at(row)
        length = starts[segment + 1] - starts[segment]
        pairs = int(self.ends[segment]) + _pairs(row - starts[segment], length, self.causal, self.window)
        return pairs + self._mutual_before(row)

    def _mutual_before(self, row: int) -> int:
        if len(self.mutual) == 1:
            return 0
        segments = self.segments
        index = bisect_left(segments.spans, row, key=lambda span: span.start)  # spans that start before the row
        if index == 0 or row >= segments.spans[index - 1].stop:
            return int(self.mutual[index])
        span, window = segments.spans[index - 1], None if segments.cut_spans else self.window
        return int(self.mutual[index - 1]) + _mutual_pairs(row - span.start, len(span), window)

    def row_at(self, work: int) -> int:
        """The first row that has at least this much work before it."""
        return self.rows_at([work])[0]

    def rows_at(self, works: Sequence[int]) -> list[int]:
        """The first rows that have at least so much work before them: of many, as each looks the segments through."""
        starts = self.segments.starts
        if len(self.mutual) > 1:
            return [bisect_left(range(starts[-1]), work, key=self.before) for work in works]
        segments = (np.searchsorted(self.ends, works) - 1).tolist()  # the last ones that less stands before
        return [self._row_in(segment, work) for segment, work in zip(segments, works, strict=True)]

    def _row_in(self, segment: int, work: int) -> int:
        starts = self.segments.starts
        if segment < 0 or segment + 1 == len(starts):
            return 0 if segment < 0 else starts[-1]
        start, length = starts[segment], starts[segment + 1] - starts[segment]
        return start + _rows_for(work - int(self.ends[segment]), length, self.causal, self.window)

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


def shard_segments(segments: Segments, ranks: int, costs: Sequence[float] | np.ndarray, unit: int = 1) -> Shards | None:
    """Cut a stream where segments end, so that the costliest rank costs as little as possible and no rank is empty.

    Args:
        costs: the cost of each segment, in any unit.
        unit: cuts are at multiples of this number of tokens.

    Returns:
        None if there are too few places to cut.

    >>> shard_segments(Segments((0, 4, 8, 12, 24)), 2, [1, 1, 1, 3]).sizes
    (12, 12)
    """
    # Where a cut may be, and what all tokens before it cost.
    stops, running = segments.table[1:], np.cumsum(np.asarray(costs, dtype=np.float64))
    possible = (stops % unit == 0) & (np.diff(segments.table) > 0)
    places = [0, *stops[possible].tolist()]
    before = [0.0, *running[possible].tolist()]
    if segments.starts[-1] != places[-1] or len(places) <= ranks:
        return None
    # No part is less than the largest block or the mean, and parts of one block more than the mean always suffice.
    block, mean = float(np.diff(before).max()), before[-1] / ranks
    low, high = max(block, mean), min(mean + block, before[-1])
    while high - low > 2.0**-32 * before[-1]:  # bisect for the least capacity that needs no more than `ranks` parts
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(before, ranks, middle)) <= ranks else (middle, high)
    cuts = [0, *_fill(before, ranks, high * (1 + 1e-9))]
    return Shards(tuple(places[stop] - places[start] for start, stop in pairwise(cuts)))


def _fill(before: list[float], ranks: int, capacity: float) -> list[int]:
    """Where parts end that are each filled up to a capacity, but leave a place to cut for every rank that follows.

    Args:
        before: the cost before each place where a cut may be. The parts are given by the numbers of such places.
    """
    last = len(before) - 1
    ends: list[int] = []
    start = 0
    while start < last:
        full = bisect_right(before, before[start] + capacity, lo=start + 1) - 1  # the last place within the capacity
        leaving = last - ranks + len(ends) + 1  # blocks for the ranks that follow
        start = max(start + 1, min(full, leaving))
        ends.append(start)
        if len(ends) > ranks:
            break
    return ends
