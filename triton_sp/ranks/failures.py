"""A rank that fails in the middle of a step tells the others, which wait for it in a collective.

It leaves a note in the store of the process group. A rank that waits looks there now and then, and raises an error that
names the rank which has failed. A rank that has stopped leaves no note, but its heartbeat ends (waiting.py). After that
the group is closed, because its ranks may be at different collectives. If all ranks fail in the same way, for instance
at a layer that cannot be sharded, each raises its own error and the group can still be used.

This works on CPUs only. On GPUs collectives return at once, so the program never waits in one; there the launcher
(torchrun) ends the other ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from triton_sp.errors import PeerError, SPError
from triton_sp.ranks.waiting import Pulse, Sign, Waiter, keep_beating

# Seconds that ranks which fail in the same way may be apart, and that a rank waits for the notes of others.
GRACE = 1.0
_NOTE_POLL_SECONDS = 0.02
_WAIT_POLL_SECONDS = 0.25  # a rank that waits for a collective looks for notes this often
_CLOSED = "triton_sp/closed"  # the key of why a rank has closed the group: others may be in another round
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
        heartbeat: seconds without a sign of life after which a rank counts as stopped; 0 for no signs.
        owner: returns None when the group is gone.
        job, members: the board of all ranks, and the ranks of this group by their numbers there; None if they are all.
        step, steps: what this rank has begun last with the group, and how often it has begun something.
    """

    store: Any
    rank: int
    size: int
    round: int = 0
    closed: PeerError | None = None
    heartbeat: float = 0.0
    step: str = ""
    steps: int = 0
    waiter: Waiter = field(default_factory=Waiter, repr=False)
    owner: Callable[[], Any] | None = None
    job: FailureBoard | None = None
    members: Sequence[int] = ()
    forget: Callable[[], None] = field(init=False, repr=False)
    _waits: bool = False
    _beats: int = 0

    def __post_init__(self) -> None:
        """Use a connection of its own, because another call may hold that of the group for minutes."""
        with suppress(Exception):
            self.store = self.store.clone()
        store, key = self.store, f"triton_sp/alive/{self.rank}"
        self.forget = lambda: _tolerant(lambda: store.delete_key(key))

    def begin(self, step: str, heartbeat: float | None = None) -> None:
        """Tell that this rank begins a step, and how often it shall give signs of life from now on."""
        self.step, self.steps = step, self.steps + 1
        if heartbeat is not None and heartbeat != self.heartbeat:
            self.heartbeat = heartbeat
            keep_beating(self)

    def beat(self) -> None:
        """Give a sign of life; the last one when the group is gone."""
        if self.owner is not None and self.owner() is None:
            self.heartbeat = 0.0
            return
        self._beats += 1
        sign = Sign(self._beats, self.steps, self._waits, self.step[:_TEXT])
        _tolerant(lambda: self.store.set(f"triton_sp/alive/{self.rank}", sign.encode()))

    def failed(self, text: str) -> None:
        """Post that this rank leaves a step with an error of its own."""
        if self.closed is not None:
            return
        self._post(text)
        notes = self._read(lambda notes: len(notes) == self.size or _NOTICED in notes.values())
        if len(notes) == self.size and _NOTICED not in notes.values() and not self._closed_elsewhere():
            self.round += 1
            if self.round > 1:  # nobody reads the notes of two rounds ago
                _tolerant(lambda: self.store.delete_key(self._key(self.rank, self.round - 2)))
        else:
            self._close(self._error(f"rank {self.rank}", f"it failed: {text}"), text)

    def explain_another(self, error: BaseException) -> PeerError:
        """`explain` for a collective that is not ours: an engine's, which has the ranks of all groups."""
        if self.closed is not None:
            return self.closed
        found = (self.job or self).explain(error, ours=False)
        if self.job is not None:
            self._post(_NOTICED)
            self._close(found)
        return found

    def explain(self, error: BaseException, ours: bool = True) -> PeerError:
        """The error to raise when a collective of this rank has failed: find out which rank caused it.

        Args:
            error: of the collective.
            ours: all ranks that wait for one of ours look for notes and leave one. In another one, those that leave
                none may be alive and wait.
        """
        if self.closed is not None:
            return self.closed
        self._post(_NOTICED)
        notes = self._read(lambda notes: any(text != _NOTICED for text in notes.values()) or len(notes) == self.size)
        notes |= self._left(set(range(self.size)) - set(notes))
        guilty = {rank: text for rank, text in notes.items() if text != _NOTICED}
        missing = [rank for rank in range(self.size) if rank not in notes]
        elsewhere = self._closed_elsewhere()
        if guilty:
            who, what = _ranks(list(guilty)), f"it failed: {next(iter(guilty.values()))}"
        elif elsewhere:
            who, _, what = elsewhere.partition(": ")
        elif missing and (ours or len(missing) == 1):
            who, what = _ranks(missing), f"no sign of life: it ended, stopped or is slow ({_first_line(error)})"
        else:
            whose = "it" if ours else "one of an engine, where others may still wait"
            who, what = "collective", f"an error in {whose}: {_first_line(error)}"
        return self._close(self._error(who, what))

    def wait(self, arrived: Callable[[], _T]) -> _T:
        """Call `arrived`, which blocks until a collective is done, and return its result.

        Raises:
            PeerError: another rank has left a note, and the collective is still not done some time later. Or another
                rank has given no sign of life for `heartbeat` seconds, or has not come for ten times as long.
        """
        if self.closed is not None:
            raise self.closed
        done = self.waiter.start(arrived)
        if done.ready.wait(_WAIT_POLL_SECONDS):
            return done.result()
        alarmed, looked, pulses = math.inf, time.monotonic(), [Pulse() for _ in range(self.size)]
        self._waits = True
        try:
            while not done.ready.wait(_WAIT_POLL_SECONDS):
                now = time.monotonic()
                if now > alarmed + GRACE / 2:
                    raise self.explain(TimeoutError("others noticed a failure"))
                if alarmed == math.inf and (self._read(lambda _: True) or self._closed_elsewhere()):
                    alarmed = now
                if self.heartbeat and now > looked + self.heartbeat / 8:
                    looked = now
                    self._look_at_others(pulses)
        except BaseException:
            self.waiter.abandon()
            raise
        finally:
            self._waits = False
        return done.result()

    def _look_at_others(self, pulses: list[Pulse]) -> None:
        """Raise a PeerError about a rank that has stopped, or that has not come for too long."""
        complaints = {}
        for rank in set(range(self.size)) - {self.rank}:
            key, sign = f"triton_sp/alive/{rank}", None
            if _tolerant(lambda key=key: self.store.check([key])):
                text = _tolerant(lambda key=key: self.store.get(key))
                sign = _tolerant(lambda text=text: Sign.decode(text)) if text else None
            complaint = pulses[rank].complaint(sign, self.heartbeat)
            if complaint:
                complaints[rank] = complaint
        # Of those that are late, those that wait for others themselves are not to blame, if there is another.
        blamed = {rank: text for rank, text in complaints.items() if not text.startswith("all ranks")}
        if blamed or len(complaints) == self.size - 1:
            rank, text = next(iter((blamed or complaints).items()))
            self._post(_NOTICED)
            raise self._close(self._error(f"rank {rank}", text))

    def _error(self, who: str, what: str) -> PeerError:
        return PeerError(
            who,
            expected="it to take part in every step",
            found=what,
            remedy="see its own output, and start all ranks again: the group is closed",
            rank=self.rank,
        )

    def _close(self, error: PeerError, why: str = _NOTICED) -> PeerError:
        """From now on each collective raises this error, here; and one about this rank's elsewhere. Ranks of other
        groups can learn why this one has left: a failure of its own, or one that it has noticed."""
        self.closed = error
        store, number = (self.job or self).store, self._number(self.rank)
        _tolerant(lambda: store.set(f"triton_sp/left/{number}", why[:_TEXT]))
        _tolerant(lambda: self.store.set(_CLOSED, f"{error.field}: {error.found}"[:_TEXT]))
        return error

    def _closed_elsewhere(self) -> str:
        if not _tolerant(lambda: self.store.check([_CLOSED])):
            return ""
        return (_tolerant(lambda: self.store.get(_CLOSED)) or b"").decode(errors="replace")

    def _number(self, rank: int) -> int:
        return rank if self.job is None else self.members[rank]

    def _left(self, ranks: set[int]) -> dict[int, str]:
        """Why ranks have left any group, of those that have. One that left because of another is not to blame."""
        store, found = (self.job or self).store, {}
        for rank in ranks:
            key = f"triton_sp/left/{self._number(rank)}"
            if _tolerant(lambda key=key: store.check([key])):
                found[rank] = (_tolerant(lambda key=key: store.get(key)) or b"").decode(errors="replace")
        return found

    def _post(self, text: str) -> None:
        _tolerant(lambda: self.store.set(self._key(self.rank), text[:_TEXT]))

    def _read(self, enough: Callable[[dict[int, str]], bool]) -> dict[int, str]:
        """The notes by rank, as soon as `enough` says so, or after GRACE seconds."""
        notes: dict[int, str] = {}
        end = time.monotonic() + GRACE
        while True:
            for rank in range(self.size):
                if rank not in notes and _tolerant(lambda rank=rank: self.store.check([self._key(rank)])):
                    notes[rank] = (_tolerant(lambda rank=rank: self.store.get(self._key(rank))) or b"").decode(
                        errors="replace"
                    )
            if enough(notes) or time.monotonic() > end:
                return notes
            time.sleep(_NOTE_POLL_SECONDS)

    def _key(self, rank: int, round: int | None = None) -> str:
        return f"triton_sp/failed/{self.round if round is None else round}/{rank}"


# --- notes ---------------------------------------------------------------------------------------------------------


def _tolerant(action: Callable[[], Any]) -> Any:
    """Call `action`; None if the store is gone with the rank that kept it. Then errors have less to say."""
    try:
        return action()
    except Exception:
        return None


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def text_of(error: BaseException) -> str:
    """What an error says, in characters that can be sent; its type where it cannot say it."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception:
        return type(error).__name__


def _first_line(error: BaseException) -> str:
    return (text_of(error).splitlines() or [type(error).__name__])[0][:200]


def _is_lost_connection(error: BaseException) -> bool:
    """Whether it comes of a collective that is not ours, such as an engine's that gathers weights in the forward."""
    return isinstance(error, RuntimeError) and any(name in text_of(error) for name in ("gloo/", "NCCL"))


@contextmanager
def reporting_failures(board: FailureBoard) -> Iterator[None]:
    """A part of a step. If an error is raised in it, the other ranks are told. An error of a connection that another
    rank has lost becomes a PeerError, about that rank if it can be known."""
    try:
        yield
    except BaseException as error:  # also a KeyboardInterrupt, after which the process may live on
        if isinstance(error, PeerError) or getattr(error, "everywhere", False):
            raise  # the other ranks know already
        if _is_lost_connection(error):
            raise board.explain_another(error) from error
        board.failed(f"{type(error).__name__}: {text_of(error)}")
        if isinstance(error, SPError) and error.rank is None:
            raise error.on_rank(board.rank) from error
        raise
