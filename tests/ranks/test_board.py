"""Notes by which ranks tell one another who has failed, and the heartbeat: boards on one store, in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from triton_sp.errors import InputError, PeerError
from triton_sp.ranks import failures
from triton_sp.ranks.failures import FailureBoard, reporting_failures, text_of
from triton_sp.ranks.waiting import Sign


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths."""
    monkeypatch.setattr(failures, "GRACE", 0.3)
    monkeypatch.setattr(failures, "_WAIT_POLL_SECONDS", 0.02)


def boards(count: int) -> list[FailureBoard]:
    store = dist.HashStore()
    return [FailureBoard(store, rank, count) for rank in range(count)]


def boards_of_a_part(everyone: list[FailureBoard], members: list[int]) -> list[FailureBoard]:
    """Of a group of some ranks of a job."""
    store, size = dist.PrefixStore(f"{members}", everyone[0].store), len(members)
    return [FailureBoard(store, i, size, job=everyone[rank], members=members) for i, rank in enumerate(members)]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that are made at the same time, or their errors."""
    found: list[Any] = [None] * len(calls)

    def make(index: int) -> None:
        try:
            found[index] = calls[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=make, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


SECONDS = failures.GRACE, failures._WAIT_POLL_SECONDS, failures._NOTE_POLL_SECONDS


def test_a_rank_has_a_second_to_say_that_it_failed_too() -> None:
    grace, waits, looks = SECONDS
    assert 0.5 <= grace <= 2 and 0.1 <= waits <= grace / 2 and 0 < looks <= grace / 10


LOST = RuntimeError("connection lost\nat a place")


def test_a_rank_that_fails_alone_is_named() -> None:
    first, second, third = everyone = boards(3)
    _, here, there = together(
        lambda: first.failed("no memory"), lambda: second.explain(LOST), lambda: third.explain(LOST)
    )
    for rank, error in ((1, here), (2, there)):
        assert isinstance(error, PeerError) and error.rank == rank
        assert (error.field, error.found) == ("rank 0", "it failed: no memory")
    assert first.closed is not None and (first.closed.field, first.closed.rank) == ("rank 0", 0)
    assert all(board.explain(ValueError()) is board.closed for board in everyone)
    with pytest.raises(PeerError) as raised:
        second.wait(lambda: 1)
    assert raised.value is second.closed


@pytest.mark.parametrize(("present", "who"), [([0, 1], "rank 2"), ([0], "ranks 1, 2")])
def test_a_rank_that_leaves_no_note_is_named(present: list[int], who: str) -> None:
    everyone = boards(3)
    for error in together(*(lambda rank=rank: everyone[rank].explain(LOST) for rank in present)):
        assert error.field == who
        assert error.found == "no sign of life: it ended, stopped or is slow (connection lost)"


def test_where_all_notice_it_is_the_collective() -> None:
    first, second = boards(2)
    for error in together(lambda: first.explain(LOST), lambda: second.explain(RuntimeError())):
        assert error.field == "collective" and error.found in (
            "an error in it: connection lost",
            "an error in it: RuntimeError",
        )


def test_a_rank_that_comes_later_is_told_what_closed_the_group() -> None:
    first, second, third = boards(3)
    first.failed("x")
    assert third.explain(LOST).field == "rank 0"
    second.round = 5  # it reads other notes
    assert (second.explain(LOST).field, second.explain(LOST).found) == ("rank 0", "it failed: x")


def test_all_that_fail_alike_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as all have left a note. The notes of a round are removed when the next but one is over."""
    monkeypatch.setattr(failures, "GRACE", 20.0)
    begin = time.monotonic()
    first, second = boards(2)
    for number in range(1, 5):
        together(lambda: first.failed("x"), lambda: second.failed("y"))
        assert (first.round, second.round) == (number, number) and first.closed is second.closed is None
        kept = [round for round in range(number) if first.store.check([f"triton_sp/failed/{round}/0"])]
        assert kept == list(range(max(0, number - 1), number))
    assert first.wait(lambda: 3) == 3  # notes of rounds that are over alarm nobody
    assert time.monotonic() < begin + 15


def test_one_of_several_that_fail_while_another_waits_closes_the_group() -> None:
    first, second, third = boards(3)
    together(lambda: first.failed("x"), lambda: second.failed("y"), lambda: third.explain(LOST))
    assert [board.closed.field for board in (first, second)] == ["rank 0", "rank 1"] and first.round == 0
    assert third.closed is not None and third.closed.field in ("ranks 0, 1", "rank 0", "rank 1")


def test_waiting_returns_and_raises_what_the_call_does() -> None:
    (board,) = boards(1)
    assert board.wait(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        board.wait(lambda: 1 // 0)
    assert not board._waits


def test_who_waits_is_alarmed_by_a_note_and_gives_the_call_some_time() -> None:
    first, second = boards(2)
    second._post("it broke")
    assert first.wait(lambda: time.sleep(0.1) or 5) == 5  # it arrives although a rank has failed
    begun, release = time.monotonic(), threading.Event()
    with pytest.raises(PeerError) as raised:
        first.wait(release.wait)
    assert 0.1 < time.monotonic() - begun < 5 and raised.value.found == "it failed: it broke"
    release.set()


def test_who_waits_is_alarmed_by_a_closed_group() -> None:
    first, second = boards(2)
    second.round = 3
    second.failed("x")
    release = threading.Event()
    with pytest.raises(PeerError) as raised:
        first.wait(release.wait)
    assert raised.value.field == "rank 1"
    release.set()


def test_who_left_another_group_says_whether_it_is_to_blame() -> None:
    """Ranks 0 and 1 add gradients over all four ranks while the others, who share a batch, have failed in it."""
    everyone = boards(4)
    third, fourth = boards_of_a_part(everyone, [2, 3])
    assert fourth.explain(LOST).field == "rank 0"  # of the two: the third rank has stopped
    for error in together(lambda: everyone[0].explain(LOST), lambda: everyone[1].explain(LOST)):
        assert error.field == "rank 2" and error.found.startswith("no sign of life")

    everyone = boards(4)
    third, fourth = boards_of_a_part(everyone, [2, 3])
    together(lambda: third.failed("no memory"), lambda: fourth.explain(LOST))
    for error in together(lambda: everyone[0].explain(LOST), lambda: everyone[1].explain(LOST)):
        assert (error.field, error.found) == ("rank 2", "it failed: no memory")


def test_those_that_all_fail_alike_have_not_left() -> None:
    everyone = boards(3)
    pair = boards_of_a_part(everyone, [1, 2])
    together(lambda: pair[0].failed("x"), lambda: pair[1].failed("y"))
    assert everyone[0].explain(LOST).field == "ranks 1, 2"


# --- the heartbeat -------------------------------------------------------------------------------------------------


def test_a_beat_tells_what_a_rank_does() -> None:
    first, _ = boards(2)
    first.begin("forward 1")
    first.begin("x" * 3000)
    first.beat()
    first.beat()
    sign = Sign.decode(first.store.get("triton_sp/alive/0"))
    assert sign == Sign(2, 2, False, "x" * 2000)
    first.heartbeat, first.owner = 1.0, lambda: None  # the group is gone
    first.beat()
    assert first.heartbeat == 0 and Sign.decode(first.store.get("triton_sp/alive/0")).beats == 2


def test_hearts_beat_four_times_a_heartbeat_until_they_are_told_otherwise() -> None:
    first, _ = boards(2)
    first.begin("a", 0.4)
    time.sleep(0.65)
    assert 2 <= first._beats <= 8
    first.begin("b", 0.0)
    time.sleep(0.15)
    beats = first._beats
    time.sleep(0.25)
    assert first._beats == beats


def test_who_waits_names_a_rank_that_has_stopped() -> None:
    """Of three ranks the second one beats no more; the third waits for it too and is not to blame."""
    first, second, third = boards(3)
    second.begin("forward 7")
    second.beat()
    release, ends = threading.Event(), threading.Event()
    third._waits = True

    def third_lives() -> None:
        while not ends.wait(0.05):
            third.beat()

    first.heartbeat, begin = 0.4, time.monotonic()
    thread = threading.Thread(target=third_lives)
    thread.start()
    with pytest.raises(PeerError) as raised:
        first.wait(release.wait)
    assert time.monotonic() < begin + 7
    ends.set()
    release.set()
    thread.join()
    found = "no heartbeat for 0.4 s: it is stopped, or hangs; the last that it began: forward 7"
    assert (raised.value.field, raised.value.found) == ("rank 1", found)
    assert second.store.get("triton_sp/failed/0/0") == b"noticed"


# --- what is reported ----------------------------------------------------------------------------------------------


class Board:
    """What is told to it."""

    rank = 3

    def __init__(self) -> None:
        self.told: list[str] = []

    def failed(self, text: str) -> None:
        self.told.append(text)


def refused(**more: Any) -> InputError:
    return InputError("x", expected="a", found="b", remedy="c", **more)


def test_what_others_are_told_of_an_error() -> None:
    board: Any = Board()
    with pytest.raises(KeyboardInterrupt), reporting_failures(board):
        raise KeyboardInterrupt
    with pytest.raises(InputError) as raised, reporting_failures(board):
        raise refused()
    assert raised.value.rank == 3 and isinstance(raised.value.__cause__, InputError)
    with pytest.raises(InputError) as raised, reporting_failures(board):
        raise refused(rank=1)
    assert raised.value.rank == 1
    assert [text.split(":")[0] for text in board.told] == ["KeyboardInterrupt", "InputError", "InputError"]
    for known in (PeerError("x", expected="a", found="b", remedy="c"), refused()):
        known.everywhere = True  # type: ignore[attr-defined]
        with pytest.raises(type(known)) as kept, reporting_failures(board):
            raise known
        assert kept.value is known and len(board.told) == 3
    with reporting_failures(board):
        pass
    assert len(board.told) == 3


def test_a_connection_that_an_engine_lost_is_blamed_on_the_rank_that_failed() -> None:
    """FSDP gathers weights in the forward, and its error names no rank."""
    first, second = boards(2)
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    def survives() -> None:
        with reporting_failures(second):
            raise lost

    _, found = together(lambda: first.failed("MemoryError"), survives)
    assert isinstance(found, PeerError) and found.__cause__ is lost
    assert (found.field, found.found) == ("rank 0", "it failed: MemoryError")
    board: Any = Board()
    for other in (RuntimeError("a shape that does not fit"), ValueError("gloo/x")):
        with pytest.raises(type(other)) as raised, reporting_failures(board):
            raise other
        assert raised.value is other
    assert len(board.told) == 2


@pytest.mark.parametrize(
    ("groups", "present", "who"),
    [
        ([[0, 1]], [0], "rank 1"),
        ([[0, 1, 2]], [0], "collective"),
        ([[0, 1, 2]], [0, 2], "rank 1"),
        ([[0, 1], [2, 3]], [0], "collective"),
        ([[0, 1], [2, 3]], [0, 2, 3], "rank 1"),
        ([[0, 1], [2, 3]], [2, 3], "collective"),
    ],
)
def test_who_says_nothing_is_blamed_for_an_engine_s_collective_only_if_no_other_can_be(groups, present, who) -> None:
    """Ranks that wait for an engine's collective leave no note before it fails there too: they are not the cause. And
    FSDP's and DDP's collectives have the ranks of all groups, by whose numbers the error names them."""
    everyone = boards(sum(map(len, groups)))
    own = [board for group in groups for board in boards_of_a_part(everyone, group)] if len(groups) > 1 else everyone

    def survives(board: FailureBoard) -> None:
        with reporting_failures(board):
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    for rank, error in zip(
        present, together(*(lambda rank=rank: survives(own[rank]) for rank in present)), strict=True
    ):
        assert isinstance(error, PeerError) and (error.field, error.rank) == (who, rank), error
        assert own[rank].closed is error and own[rank].explain(LOST) is error
        assert own[rank].explain_another(LOST) is error
        assert who == "rank 1" or error.found.startswith("an error in one of an engine, where others may still wait: [")


def test_a_failure_in_another_group_explains_an_engine_s_collective() -> None:
    everyone = boards(4)
    pair, others = boards_of_a_part(everyone, [0, 1]), boards_of_a_part(everyone, [2, 3])
    together(lambda: pair[1].failed("no memory"), lambda: pair[0].explain(LOST))
    for error in together(*(lambda board=board: board.explain_another(LOST) for board in others)):
        assert (error.field, error.found) == ("rank 1", "it failed: no memory")


def test_a_text_can_be_sent() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert text_of(OSError("no file \udcff")) == "no file \\udcff" and text_of(Silent()) == "Silent"
