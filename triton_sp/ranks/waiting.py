"""Waiting for other ranks: blocking calls in a thread, and the heartbeat that tells a stopped rank from a slow one.

A collective blocks until every rank has come to it. So it is waited for in a thread of its group's own, and the program
looks around meanwhile. (With one thread for all groups, two models in two threads would wait for one another.)
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

PATIENCE = 10  # heartbeats that a rank may be alive and not come


class Task:
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
        """What the call has returned, or raised."""
        if self.error is not None:
            raise self.error
        return self.value


class Waiter:
    """A thread that makes one call after another. It ends when its waiter is dropped."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] | None = None

    def start(self, call: Callable[[], Any]) -> Task:
        """Begin a call, and return at once."""
        if self._tasks is None:
            self._tasks = SimpleQueue()
            threading.Thread(target=_serve, args=(self._tasks,), name="triton_sp waits", daemon=True).start()
        task = Task(call)
        self._tasks.put(task)
        return task

    def abandon(self) -> None:
        """Leave the thread to a call that may never end; the next call starts another one."""
        if self._tasks is not None:
            self._tasks.put(None)
        self._tasks = None

    __del__ = abandon


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # a collective's tensors are not kept until the next one


# --- the heartbeat -------------------------------------------------------------------------------------------------


class Alive(Protocol):
    """What has a heartbeat: `beat` tells others that this process runs; `heartbeat` is in seconds, 0 for none. `forget`
    takes back what it has told them; it is called when the object is gone, so it must not know it."""

    heartbeat: float
    forget: Callable[[], None]

    def beat(self) -> None:
        """Give a sign of life."""


_threads: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()
_ends = threading.Event()  # of the process


def keep_beating(heart: Alive) -> None:
    """Let `heart.beat` be called four times a heartbeat, until that is another one or the object is gone. Each has a
    thread of its own, because a store whose owner has ended may block it."""
    if heart.heartbeat:
        wake = threading.Event()
        arguments = (weakref.ref(heart), heart.heartbeat, heart.forget, wake)
        thread = threading.Thread(target=_beat, args=arguments, name="triton_sp heartbeat", daemon=True)
        _threads[thread] = wake
        weakref.finalize(heart, wake.set).atexit = False
        thread.start()


def _beat(reference: weakref.ref[Alive], seconds: float, forget: Callable[[], None], wake: threading.Event) -> None:
    while not _ends.is_set() and (heart := reference()) is not None and heart.heartbeat == seconds:
        heart.beat()
        del heart
        wake.wait(seconds / 4)
    if not _ends.is_set() and (heart := reference()) is None:
        forget()


@atexit.register
def _end() -> None:
    """A thread that comes back from C++ while the interpreter ends would take the process down."""
    _ends.set()
    for thread, wake in list(_threads.items()):
        wake.set()
        thread.join(1.0)


@dataclass(frozen=True)
class Sign:
    """What a rank tells at a heartbeat.

    Attributes:
        beats: how many there were.
        steps: how many steps it has begun, in its group.
        waits: whether it waits for others.
        step: the last step that it has begun.
    """

    beats: int
    steps: int
    waits: bool
    step: str

    def encode(self) -> str:
        """As a text for `decode`."""
        return f"{self.beats} {self.steps} {int(self.waits)} {self.step}"

    @classmethod
    def decode(cls, text: bytes) -> Sign:
        """
        >>> Sign.decode(Sign(3, 2, True, "forward 2").encode().encode())
        Sign(beats=3, steps=2, waits=True, step='forward 2')
        """
        beats, steps, waits, step = text.decode(errors="replace").split(" ", 3)
        return cls(int(beats), int(steps), waits == "1", step)


@dataclass
class Pulse:
    """What a rank that waits has seen of another one's heartbeat."""

    sign: Sign | None = None
    beaten: float = field(default_factory=time.monotonic)  # when the last beat was seen, and when the last step
    stepped: float = field(default_factory=time.monotonic)

    def complaint(self, sign: Sign | None, heartbeat: float) -> str | None:
        """What is wrong with the rank, now that `sign` is the last that was seen of it; None if nothing is."""
        now, before = time.monotonic(), self.sign
        if sign != before:
            self.beaten = now
        if sign is not None and (before is None or sign.steps != before.steps):
            self.stepped = now
        self.sign = sign
        if sign is not None and now - self.beaten > heartbeat:
            return f"no heartbeat for {heartbeat:g} s: it is stopped, or hangs; the last that it began: {sign.step}"
        if now - self.stepped > PATIENCE * heartbeat:
            if sign is None:
                return f"no wrapped model there for {PATIENCE * heartbeat:g} s"
            if not sign.waits:
                gone = f"it is alive and has begun nothing with this group for {PATIENCE * heartbeat:g} s"
                return f"{gone}; the last was: {sign.step or 'nothing'}"
            return f"all ranks wait for one another; the last that it began: {sign.step}"
        return None
