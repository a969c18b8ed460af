"""Which heads a rank attends with.

A rank has one or more tasks. A task is some key/value heads with their query heads, and a range of rows of the stream.
If the ranks divide the heads evenly, each rank gets whole heads. Otherwise the rows of a key/value head and its query
heads are divided between ranks by work. What must travel for the tasks is in boxes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from triton_sp.plan.segments import Work


@dataclass(frozen=True)
class HeadTask:
    """Attention that one rank computes.

    Attributes:
        q, kv: the query heads, and their key/value heads.
        rows: the rows of the stream.
        keys: the keys of the stream that these rows see.
    """

    q: range
    kv: range
    rows: range
    keys: range

    @property
    def side_by_side(self) -> bool:
        """Whether the task needs queries, keys and values of the same tokens, which then travel side by side."""
        return self.rows == self.keys


Tasks = tuple[HeadTask, ...]


def describe_tasks(tasks: Tasks, rows: int) -> str:
    """The tasks of one rank in words.

    Args:
        rows: how many rows the stream has.

    >>> every, part = range(100), range(71)
    >>> whole, cut = HeadTask(range(0, 2), range(0, 2), every, every), HeadTask(range(2, 3), range(2, 3), part, part)
    >>> describe_tasks((whole, cut), 100)
    'heads 0-1, head 2 in rows 0-70'
    """
    parts = []
    for task in tasks:
        heads = f"head {task.q.start}" if len(task.q) == 1 else f"heads {task.q.start}-{task.q.stop - 1}"
        cut = "" if len(task.rows) == rows else f" in rows {task.rows.start}-{task.rows.stop - 1}"
        parts.append(heads + cut)
    return ", ".join(parts) or "no heads"


def assign_whole_heads(num_heads: int, num_kv_heads: int, ranks: int, rows: int) -> tuple[Tasks, ...] | None:
    """The tasks of each rank, in rank order, in whole heads; None if these do not divide evenly.

    >>> tasks_of_ranks = assign_whole_heads(8, 2, 4, rows=100)
    >>> [(task.q, task.kv) for tasks in tasks_of_ranks for task in tasks][:3]
    [(range(0, 2), range(0, 1)), (range(2, 4), range(0, 1)), (range(4, 6), range(1, 2))]
    >>> assign_whole_heads(28, 4, 8, rows=100) is None
    True
    """
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        return None
    per_rank, group = num_heads // ranks, num_heads // num_kv_heads
    queries = [range(rank * per_rank, (rank + 1) * per_rank) for rank in range(ranks)]
    every = range(rows)
    return tuple((HeadTask(q, range(q.start // group, (q.stop - 1) // group + 1), every, every),) for q in queries)


def assign_heads(num_heads: int, num_kv_heads: int, ranks: int, work: Work) -> tuple[Tasks, ...]:
    """The tasks of each rank, in rank order. Every (head, row) is in exactly one of them, and work is equal.

    The busiest rank has at most the mean work plus the work of one row in the query heads of one key/value head.

    >>> from triton_sp.plan.segments import Segments
    >>> tasks_of_ranks = assign_heads(3, 3, 2, Segments((0, 100)).work(causal=True))
    >>> [(task.q, task.rows, task.keys) for task in tasks_of_ranks[0]]
    [(range(0, 1), range(0, 100), range(0, 100)), (range(1, 2), range(0, 71), range(0, 71))]
    >>> [(task.q, task.rows, task.keys) for task in tasks_of_ranks[1]]
    [(range(1, 2), range(71, 100), range(0, 100)), (range(2, 3), range(0, 100), range(0, 100))]
    """
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    rows, group = work.segments.starts[-1], num_heads // num_kv_heads
    whole = assign_whole_heads(num_heads, num_kv_heads, ranks, rows)
    if whole is not None:
        return whole
    # Imagine all work in one line: key/value head after key/value head, row after row. Ranks get equal parts of it.
    places = [divmod(rank * num_kv_heads, ranks) for rank in range(ranks + 1)]
    rests = sorted({rest for _, rest in places})
    row_of = dict(zip(rests, work.rows_at([-(-rest * work.total // ranks) for rest in rests]), strict=True))
    cuts = [(head, row_of[rest]) for head, rest in places]
    return tuple(
        tuple(
            HeadTask(range(kv.start * group, kv.stop * group), kv, part, work.keys(part))
            for kv, part in _pieces(begin, end, range(rows))
        )
        for begin, end in pairwise(cuts)
    )


def _pieces(begin: tuple[int, int], end: tuple[int, int], everything: range) -> list[tuple[range, range]]:
    """What is between two (head, row): the rest of a head, whole heads, the beginning of a head; if there are any."""
    (head, row), (last_head, last_row) = begin, end
    if head == last_head:
        pieces = [(range(head, head + 1), range(row, last_row))]
    else:
        whole = head if row == 0 else head + 1
        pieces = [
            (range(head, whole), range(row, everything.stop)),
            (range(whole, last_head), everything),
            (range(last_head, last_head + 1), range(last_row)),
        ]
    return [(heads, rows) for heads, rows in pieces if heads and rows]
