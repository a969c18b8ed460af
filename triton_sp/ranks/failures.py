"""A rank that fails in the middle of a step tells the others, which wait for it in a collective.

It leaves a note in the store of the process group. A rank that waits looks there now and then, and raises an error that
names the rank which has failed. After that the group is closed, because its ranks may be at different collectives. If
all ranks fail in the same way, for instance at a layer that cannot be sharded, each raises its own error and the group
can still be used.

This works on CPUs only. On GPUs collectives return at once, so the program never waits in one; there the launcher
(torchrun) ends the other ranks.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from triton_sp.errors import PeerError

# Seconds that ranks which fail in the same way may be apart, and that a rank waits for the notes of others.
GRACE = 1.0
_NOTE_POLL_SECONDS = 0.02
_WAIT_POLL_SECONDS = 0.25  # a rank that waits for a collective looks for notes this often
_NOTICED = "noticed"  # the note of a rank that fails because another has failed
_TEXT = 2000  # the most characters of a note
_T = TypeVar("_T")


@dataclass(eq=False)
class FailureBoard:
    """The notes of the ranks of a group, in a key/value store that all of them can reach.

    Attributes:
        store: an object with `set`, `get` and `check`, such as a store of torch.distributed.
        round: how often all ranks have failed in the same way; notes of earlier rounds are not read again.
        closed: the reason why the group cannot be used any more; None while it can.
    """

    store: Any
    rank: int
    size: int
    round: int = 0
    closed: PeerError | None = None

    def failed(self, text: str) -> None:
        """Post that this rank leaves a step with an error of its own."""
        if self.closed is not None:
            return
        self._post(text)
        notes = self._read(lambda notes: len(notes) == self.size or _NOTICED in notes.values())
        if len(notes) == self.size and _NOTICED not in notes.values():
            self.round += 1
        else:
            self.closed = self._error(f"rank {self.rank}", f"it failed: {text}")

    def explain(self, error: BaseException) -> PeerError:
        """The error to raise when a collective of this rank has failed: find out which rank caused it."""
        if self.closed is not None:
            return self.closed
        self._post(_NOTICED)
        notes = self._read(lambda notes: any(text != _NOTICED for text in notes.values()) or len(notes) == self.size)
        guilty = {rank: text for rank, text in notes.items() if text != _NOTICED}
        missing = [rank for rank in range(self.size) if rank not in notes]
        if guilty:
            who, what = _ranks(list(guilty)), f"it failed: {next(iter(guilty.values()))}"
        elif missing:
            who, what = _ranks(missing), f"no sign of life: it ended, stopped or is slow ({_first_line(error)})"
        else:
            who, what = "collective", f"an error in it: {_first_line(error)}"
        self.closed = self._error(who, what)
        return self.closed

    def wait(self, arrived: Callable[[], _T]) -> _T:
        """Call `arrived`, which blocks until a collective is done, and return its result.

        Raises:
            PeerError: another rank has left a note, and the collective is still not done some time later.
        """
        if self.closed is not None:
            raise self.closed
        done = _background(arrived)
        alarmed = math.inf
        while not done.ready.wait(_WAIT_POLL_SECONDS):
            if time.monotonic() > alarmed + GRACE / 2:
                _abandon()
                raise self.explain(TimeoutError("others noticed a failure"))
            if alarmed == math.inf and self._read(lambda _: True):
                alarmed = time.monotonic()
        return done.result()

    def _error(self, who: str, what: str) -> PeerError:
        return PeerError(
            who,
            expected="it to take part in every step",
            found=what,
            remedy="see its own output, and start all ranks again: the group is closed",
            rank=self.rank,
        )

    def _post(self, text: str) -> None:
        _tolerant(lambda: self.store.set(self._key(self.rank), text[:_TEXT]))

    def _read(self, enough: Callable[[dict[int, str]], bool]) -> dict[int, str]:
        """The notes by rank, as soon as `enough` says so, or after GRACE seconds."""
        notes: dict[int, str] = {}
        end = time.monotonic() + GRACE
        while True:
            for rank in range(self.size):
                if rank not in notes and _tolerant(lambda rank=rank: self.store.check([self._key(rank)])):
                    notes[rank] = (_tolerant(lambda rank=rank: self.store.get(self._key(rank))) or b"").decode()
            if enough(notes) or time.monotonic() > end:
                return notes
            time.sleep(_NOTE_POLL_SECONDS)

    def _key(self, rank: int) -> str:
        return f"triton_sp/failed/{self.round}/{rank}"


# --- waiting -------------------------------------------------------------------------------------------------------


class _Task:
    """A call in another thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.ready = call, threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:
            self.error = error
        self.ready.set()

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


_tasks: SimpleQueue[_Task] | None = None  # of the thread that waits for collectives


def _background(call: Callable[[], Any]) -> _Task:
    """Make the call in a thread. One thread serves all calls, until it is abandoned in a call that never ends."""
    global _tasks
    if _tasks is None:
        _tasks = SimpleQueue()
        threading.Thread(target=_serve, args=(_tasks,), name="triton_sp waits", daemon=True).start()
    task = _Task(call)
    _tasks.put(task)
    return task


def _serve(tasks: SimpleQueue[_Task]) -> None:
    while tasks is _tasks:
        tasks.get().run()


def _abandon() -> None:
    """Leave the thread to a call that never ends; the next call starts another one."""
    global _tasks
    _tasks = None


# --- notes ---------------------------------------------------------------------------------------------------------


def _tolerant(action: Callable[[], Any]) -> Any:
    """Call `action`; None if the store is gone with the rank that kept it. Then errors have less to say."""
    try:
        return action()
    except RuntimeError:
        return None


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@contextmanager
def reporting_failures(board: FailureBoard) -> Iterator[None]:
    """A part of a step. If an error is raised in it, the other ranks are told."""
    try:
        yield
    except PeerError:
        raise  # the other ranks know already
    except Exception as error:
        board.failed(f"{type(error).__name__}: {error}")
        raise


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
    """A hook for the gradients of a call's outputs. If the backward that begins there fails, the others are told."""

    def __init__(self, board: FailureBoard) -> None:
        self.board, self.task = board, -1

    def __call__(self, grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:  # once in a backward, although several outputs have the hook
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(_Backward(self.board))
