"""What must travel so that each rank can attend with its heads: where each block of vectors lies in which buffer.

A Route is what one rank sends and receives in the two exchanges of a layer to compute its tasks (heads.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from triton_sp.plan.heads import Tasks
from triton_sp.plan.shards import Shards, overlap


class Box(NamedTuple):
    """`rows` x `heads` vectors of one of several tensors, and where they are in a flat buffer.

    Vector (row + r, head + h) of the tensor is vector `start + r * stride + h` of the buffer.
    """

    tensor: int
    row: int
    rows: int
    head: int
    heads: int
    start: int
    stride: int


class Buffer(NamedTuple):
    """A send or receive buffer of an exchange.

    Attributes:
        boxes: where its vectors belong.
        sizes: how many vectors go to each rank, or come from it.
    """

    boxes: tuple[Box, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives in one layer.

    Attributes:
        tasks: the tasks of this rank.
        inputs: this rank's (q, k, v) in the first send buffer.
        arrivals: the tasks' (q, k, v, q, k, v, ...) in the first receive buffer.
        outputs: the tasks' (out, out, ...) in the second send buffer.
        results: this rank's (out,) in the second receive buffer.
    """

    tasks: Tasks
    inputs: Buffer
    arrivals: Buffer
    outputs: Buffer
    results: Buffer

    @property
    def in_place(self) -> bool:
        """Whether the receive buffer is already the stream of one task, token by token."""
        return len(self.tasks) == 1 and self.tasks[0].side_by_side


def route(shards: Shards, tasks_of_ranks: tuple[Tasks, ...], rank: int) -> Route:
    """The two exchanges of a layer, for one rank.

    Args:
        shards: who owns which tokens.
        tasks_of_ranks: the tasks of each rank, in rank order.
        rank: the rank.

    >>> from triton_sp.plan.heads import assign_heads
    >>> from triton_sp.plan.segments import Segments
    >>> found = route(Shards((1, 1)), assign_heads(2, 2, 2, Segments((0, 2)).work()), rank=0)
    >>> found.inputs.sizes, found.arrivals.sizes, found.outputs.sizes, found.results.sizes
    ((3, 3), (3, 3), (1, 1), (1, 1))
    >>> found.inputs.boxes[3]  # the query of head 1 for rank 1
    Box(tensor=0, row=0, rows=1, head=1, heads=1, start=3, stride=3)
    """
    own, mine = shards.range(rank), tasks_of_ranks[rank]
    others = [shards.range(other) for other in range(len(tasks_of_ranks))]
    return Route(
        mine,
        _buffer(_lay_inputs, [(tasks, own) for tasks in tasks_of_ranks], own),
        _buffer(_lay_inputs, [(mine, tokens) for tokens in others], None),
        _buffer(_lay_outputs, [(mine, tokens) for tokens in others], None),
        _buffer(_lay_outputs, [(tasks, own) for tasks in tasks_of_ranks], own),
    )


class _Part(NamedTuple):
    """Some rows and heads of a tensor of the stream, for a task, and their place in the buffer of a rank.

    Attributes:
        task: the number of the task.
        tensor: 0, 1 and 2 are queries, keys and values; or 0 are the outputs.
        rows: the rows of the task that one rank owns.
        base: all rows of the task; offsets in the task's tensors count from its start.
        heads: the heads of the task.
        start, stride: the place in the buffer, as in Box.
    """

    task: int
    tensor: int
    rows: range
    base: range
    heads: range
    start: int
    stride: int


def _lay_inputs(tasks: Tasks, tokens: range) -> tuple[list[_Part], int]:
    """Lay out q, k and v of some tokens for some tasks. Return the parts, and how many vectors they are.

    If a task needs all three of the same tokens they are laid out token by token, so that what arrives from all ranks
    is a stream already.
    """
    parts, start = [], 0
    for index, task in enumerate(tasks):
        rows, keys = overlap(task.rows, tokens), overlap(task.keys, tokens)
        if not rows and not keys:
            continue
        q, kv = len(task.q), len(task.kv)
        if task.side_by_side:
            q_stride = kv_stride = q + 2 * kv
            kv_start, stop = start + q, start + len(rows) * q_stride
        else:
            q_stride, kv_stride = q, 2 * kv
            kv_start = start + len(rows) * q
            stop = kv_start + len(keys) * kv_stride
        parts += [
            _Part(index, 0, rows, task.rows, task.q, start, q_stride),
            _Part(index, 1, keys, task.keys, task.kv, kv_start, kv_stride),
            _Part(index, 2, keys, task.keys, task.kv, kv_start + kv, kv_stride),
        ]
        start = stop
    return parts, start


def _lay_outputs(tasks: Tasks, tokens: range) -> tuple[list[_Part], int]:
    """Lay out the outputs of some tasks for some tokens, task after task."""
    parts, start = [], 0
    for index, task in enumerate(tasks):
        rows, heads = overlap(task.rows, tokens), len(task.q)
        parts.append(_Part(index, 0, rows, task.rows, task.q, start, heads))
        start += len(rows) * heads
    return parts, start


def _buffer(
    lay: Callable[[Tasks, range], tuple[list[_Part], int]], ranks: list[tuple[Tasks, range]], own: range | None
) -> Buffer:
    """Concatenate one part for each rank into a buffer.

    Args:
        lay: lays out a part.
        ranks: for each rank the tasks and the tokens that its part is about.
        own: this rank's tokens, if boxes index its own q, k and v. None if they index the tensors of the tasks, which
            are numbered task by task.
    """
    boxes, sizes, before = [], [], 0
    tensors = 3 if lay is _lay_inputs else 1
    for tasks, tokens in ranks:
        parts, size = lay(tasks, tokens)
        for task, tensor, rows, base, heads, start, stride in parts:
            place = (before + start, stride)
            if rows and own is not None:
                boxes.append(Box(tensor, rows.start - own.start, len(rows), heads.start, len(heads), *place))
            elif rows:
                boxes.append(Box(tensors * task + tensor, rows.start - base.start, len(rows), 0, len(heads), *place))
        sizes.append(size)
        before += size
    return Buffer(tuple(boxes), tuple(sizes))
