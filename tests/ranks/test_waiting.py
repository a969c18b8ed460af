"""Waiting in a thread, the heartbeat, and what a rank that waits makes of the others' signs of life."""

from __future__ import annotations

import threading
import time
from weakref import WeakKeyDictionary

import pytest

from triton_sp.ranks import waiting
from triton_sp.ranks.waiting import PATIENCE, Pulse, Sign, Waiter


class Heart:
    """Beats 50 times a second."""

    heartbeat = 0.08

    def __init__(self, events: list[str], seconds: float = 0.0) -> None:
        self.events, self.seconds, self.forget = events, seconds, lambda: events.append("forgotten")

    def beat(self) -> None:
        self.events.append("beat")
        time.sleep(self.seconds)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> WeakKeyDictionary[threading.Thread, threading.Event]:
    """Those of the hearts of a test."""
    monkeypatch.setattr(waiting, "_ends", threading.Event())
    monkeypatch.setattr(waiting, "_threads", WeakKeyDictionary())
    return waiting._threads


def test_signs_of_life_are_taken_back_when_nobody_lives(threads) -> None:
    events: list[str] = []
    heart = Heart(events)
    waiting.keep_beating(heart)
    (thread,) = threads
    while len(events) < 2:
        time.sleep(0.01)
    del heart
    thread.join(5)
    assert not thread.is_alive() and events[-1] == "forgotten" and events.count("forgotten") == 1


def test_a_heart_that_is_told_to_be_silent_keeps_its_signs(threads) -> None:
    heart = Heart([])
    waiting.keep_beating(heart)
    (thread,) = threads
    heart.heartbeat = 0.0
    thread.join(5)
    assert not thread.is_alive() and "forgotten" not in heart.events
    waiting.keep_beating(heart)
    assert list(threads) in ([], [thread])


def test_a_process_ends_when_its_hearts_have_beaten_to_the_end(threads) -> None:
    heart = Heart([], seconds=0.3)
    waiting.keep_beating(heart)
    (thread,) = threads
    while not heart.events:
        time.sleep(0.01)
    waiting._end()
    assert not thread.is_alive() and heart.events == ["beat"]


class Clock:
    """A time that a test sets."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(waiting.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(Clock, "now", 100.0)
    return Clock


def signs(beats: int, steps: int = 1, waits: bool = False, step: str = "forward 3") -> Sign:
    return Sign(beats, steps, waits, step)


def test_a_pulse_complains_about_a_stopped_rank(clock: type[Clock]) -> None:
    pulse = Pulse(None, 100.0, 100.0)
    assert pulse.complaint(signs(1), 2.0) is None
    clock.now = 102.0
    assert pulse.complaint(signs(1), 2.0) is None  # for so long exactly
    clock.now = 102.1
    assert pulse.complaint(signs(2), 2.0) is None  # a beat
    clock.now = 104.2
    complaint = pulse.complaint(signs(2), 2.0)
    assert complaint == "no heartbeat for 2 s: it is stopped, or hangs; the last that it began: forward 3"


@pytest.mark.parametrize(
    ("sign", "text"),
    [
        (signs(1), "it is alive and has begun nothing with this group for 20 s; the last was: forward 3"),
        (signs(1, step=""), "it is alive and has begun nothing with this group for 20 s; the last was: nothing"),
        (signs(1, waits=True), "all ranks wait for one another; the last that it began: forward 3"),
        (None, "no wrapped model there for 20 s"),
    ],
)
def test_a_pulse_complains_about_a_rank_that_does_not_come(clock: type[Clock], sign: Sign | None, text: str) -> None:
    pulse = Pulse(None, 100.0, 100.0)
    for second in range(PATIENCE * 2 + 1):
        clock.now = 100.0 + second
        beaten = sign and Sign(second, sign.steps, sign.waits, sign.step)
        assert pulse.complaint(beaten, 2.0) is None
    clock.now += 0.1
    assert pulse.complaint(sign and Sign(99, sign.steps, sign.waits, sign.step), 2.0) == text
    if sign:  # a new step, and it is trusted again
        assert pulse.complaint(Sign(100, sign.steps + 1, sign.waits, sign.step), 2.0) is None


def test_a_waiter_makes_one_call_after_another_and_can_leave_one_behind() -> None:
    waiter, order, release = Waiter(), [], threading.Event()
    tasks = [waiter.start(lambda index=index: order.append(index)) for index in range(3)]
    assert all(task.ready.wait(5) for task in tasks) and order == [0, 1, 2]
    held = waiter.start(release.wait)
    waiter.abandon()
    assert waiter.start(threading.current_thread).result is not None
    assert waiter.start(lambda: 7).ready.wait(5) and not held.ready.is_set()
    release.set()
    assert held.ready.wait(5) and held.result() is True
