"""A rank that fails in the middle of a step tells the others, who wait for it in a collective.

It leaves a note in the store by which the ranks found one another. Who waits looks there now and then, and raises an
error that names the rank. After that the group is closed: its ranks may stand at different collectives. Where all ranks
fail alike, as with a layer that cannot be sharded, each raises its own error and the group can be used on.

On GPUs a collective does not keep the program waiting, so nobody looks; there it is the launcher that ends the others.
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

GRACE = 1.0  # seconds that ranks which fail alike may be apart, and that one who noticed waits for the notes of others
_NOTE_POLL_SECONDS = 0.02
_WAIT_POLL_SECONDS = 0.25  # seconds after which one who waits for a collective looks for notes, and again
_NOTICED = "noticed"  # the note of a rank that failed because another did
_TEXT = 2000  # characters of a note
_T = TypeVar("_T")


@dataclass(eq=False)
class FailureBoard:
    """The notes of a group's ranks, in a key/value store that all of them reach.

    Attributes:
        store: has `set`, `get` and `check`, as torch.distributed's stores do.
        round: how often all ranks have failed alike: earlier notes are not read again.
        closed: why the group can't be used any more, if so.
    """

    store: Any
    rank: int
    size: int
    round: int = 0
    closed: PeerError | None = None

    def failed(self, text: str) -> None:
        """This rank leaves a step with an error of its own."""
        if self.closed is not None:
            return
        self._post(text)
        notes = self._read(lambda notes: len(notes) == self.size or _NOTICED in notes.values())
        if len(notes) == self.size and _NOTICED not in notes.values():
            self.round += 1
        else:
            self.closed = self._error(f"rank {self.rank}", f"it failed: {text}")

    def explain(self, error: BaseException) -> PeerError:
        """This rank's collective has failed: find out whose fault that was."""
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
        """What `arrived` returns, which blocks until a collective is done.

        Raises:
            PeerError: another rank has left a note, and some time later the collective is not done.
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
        """The notes by rank, as soon as there are enough, or when the grace is over."""
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
    """Let a thread make the call. It is the same one for all calls, but for one that has been left waiting."""
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
    """The thread waits for what will not come."""
    global _tasks
    _tasks = None


# --- notes ---------------------------------------------------------------------------------------------------------


def _tolerant(action: Callable[[], Any]) -> Any:
    """The store may have gone with the rank that kept it; then no notes are read, and the error says less."""
    try:
        return action()
    except RuntimeError:
        return None


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@contextmanager
def reporting_failures(notes: FailureBoard) -> Iterator[None]:
    """A part of a step: whatever is raised in it, the other ranks hear of it."""
    try:
        yield
    except PeerError:
        raise  # they know
    except Exception as error:
        notes.failed(f"{type(error).__name__}: {error}")
        raise


class _Backward:
    """Called at the end of a backward that succeeds; dropped without a call by one that fails."""

    def __init__(self, notes: FailureBoard) -> None:
        self.notes, self.done = notes, False

    def __call__(self) -> None:
        self.done = True

    def __del__(self) -> None:
        if not self.done:
            self.notes.failed("an error in its backward")


class BackwardWatcher:
    """A hook for the gradients of a call's outputs: if the backward that begins fails, the other ranks hear of it."""

    def __init__(self, notes: FailureBoard) -> None:
        self.notes, self.task = notes, -1

    def __call__(self, grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:  # once, though several outputs have the hook
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(_Backward(self.notes))
