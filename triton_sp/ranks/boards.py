"""The board of each process group on which its ranks tell one another about failures, see failures.py."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton_sp.ranks.failures import FailureBoard
from triton_sp.ranks.groups import Group, exists, resolve_group, world_rank

# By the name of the group; a later group of the same name has a board of its own.
_boards: dict[str, tuple[weakref.ref[Any], FailureBoard]] = {}


def board_of(group: Group) -> FailureBoard:
    """The board on which the ranks of a group tell one another about failures."""
    process_group = group.process_group
    held = _boards.get(group.name)
    if held is None or held[0]() is not process_group:
        for name in [name for name in _boards if not exists(name)]:
            del _boards[name]
        owner = weakref.ref(process_group)
        job, numbers = resolve_group(), [world_rank(rank, group) for rank in range(group.size)]
        above = None if group.size == job.size else board_of(job)
        board = FailureBoard(group.store, group.rank, group.size, owner=owner, job=above, members=numbers)
        held = _boards[group.name] = owner, board
    return held[1]


def give_sign(group: Group) -> None:
    """Tell the ranks of a group that this one is busy with the model, without them."""
    if group.name in _boards:
        _boards[group.name][1].begin("a call that is not sharded")


@contextmanager
def blaming(group: Group) -> Iterator[None]:
    """Turn an error of a collective into one that names the rank which caused it."""
    try:
        yield
    except RuntimeError as error:
        raise board_of(group).explain(error) from error
