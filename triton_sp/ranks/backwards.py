"""Backwards: which collectives one will make, when it begins, and how it is noticed that it has failed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from triton_sp.ops.differentiable import refused_second_derivative
from triton_sp.ranks.failures import FailureBoard

# Weakly: an output's hook knows these nodes, and one that is made on the way to another (features of images) is reached
# from them. Such a circle through the engine is never collected.
Nodes = list[weakref.ref[Node]]
_backwards: ContextVar[Nodes | None] = ContextVar("triton_sp_backwards", default=None)


@contextmanager
def noting_backwards() -> Iterator[Nodes]:
    """The nodes that a block adds to the graph of autograd and whose backward is a collective."""
    nodes: Nodes = []
    token = _backwards.set(nodes)
    try:
        yield nodes
    finally:
        _backwards.reset(token)


def note_backward(out: Tensor) -> Tensor:
    """To be called with what a function has returned whose backward is a collective."""
    nodes = None if torch.compiler.is_compiling() else _backwards.get()
    if nodes is not None and out.grad_fn is not None:
        nodes.append(weakref.ref(out.grad_fn))
    return out


class _Backward:
    """A callback of the autograd engine, which calls it at the end of a backward that succeeds.

    If the backward fails, the engine drops its callbacks without calling them. It holds the only reference to this
    object, so `__del__` runs at that moment.
    """

    def __init__(self, board: FailureBoard) -> None:
        self.board, self.done = board, False

    def __call__(self) -> None:
        self.done = True

    def __del__(self) -> None:
        if not self.done:
            self.board.failed("an error in its backward")


class BackwardWatcher:
    """A hook for the gradients of a call's outputs. If the backward that begins there fails, the others are told.

    A backward with `create_graph=True` is refused here, because not every stage would notice it: what is added up over
    ranks looks linear to autograd.

    Args:
        begin: called at the start of each such backward.
    """

    def __init__(self, board: FailureBoard, begin: Callable[[], None] | None = None) -> None:
        self.board, self.begin, self.task = board, begin, -1

    def __call__(self, grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == self.task:  # once in a backward, although several outputs have the hook
            return
        self.task = task
        backward = _Backward(self.board)
        torch.autograd.Variable._execution_engine.queue_callback(backward)
        if torch.is_grad_enabled():
            raise refused_second_derivative()
        if self.begin is not None:
            try:
                self.begin()
            except Exception as error:
                backward.done = getattr(error, "everywhere", False)  # then there is nobody to be told
                raise
