"""`make gpu` without a GPU: how steps are run, stopped, named and repeated; and, long, a rehearsal of every step."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from perf import gpu, preflight, selfcheck, standin, testrun
from perf.rows import records
from perf.steps import BOUNDS, CASES, FIRST, LARGE, OTHER_DTYPES, UNCHECKED, Step, rehearsal, steps
from triton_sp.kernels.verdict import Verdict

CPU = torch.device("cpu")


def shell(name: str, command: str, seconds: float = 20.0, **more: object) -> Step:
    return Step(name, ["sh", "-c", command], seconds, **more)  # type: ignore[arg-type]


def follow(course: list[Step], out: Path, budget: float = 60.0) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status, and the row of each step."""
    code = gpu.follow(course, CPU, out, budget)
    return code, {row["case"]: row for row in records(out / "steps.csv")}


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TRITON_SP_RESULTS", str(tmp_path))
    return tmp_path


def lives(process: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("end", ["wait", "true"], ids=["stopped", "ended by itself"])
def test_nothing_outlives_a_step(tmp_path, end: str) -> None:
    begin = time.monotonic()
    code, rows = follow([shell("spawns", f"sleep 300 & echo $! > {tmp_path}/child; {end}", 1.0)], tmp_path / "out")
    assert code == 0 and time.monotonic() - begin < 15
    assert rows["spawns"]["status"] == ("error: out of time" if end == "wait" else "ok")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(child)


def test_what_fails_and_what_is_written(tmp_path) -> None:
    out = tmp_path / "out"
    code, rows = follow(
        [
            shell("evidence", "echo seen; exit 9"),
            shell("later", f"grep -q 'make gpu,evidence,.*exit code 9' {out}/steps.csv && grep -q seen {out}/log.txt"),
        ],
        out,
    )
    assert code == 0 and rows["evidence"]["status"] == "error: exit code 9" and rows["later"]["status"] == "ok"
    code, rows = follow([shell("self-checks", "exit 1", test=True), shell("too late", "true")], out, budget=5.5)
    assert code == 1 and rows["self-checks"]["status"] == "error: exit code 1"
    assert rows["too late"]["status"] in ("ok", "no time left")
    code, rows = follow([shell("never", "true", test=True)], out, budget=1.0)
    assert code == 0 and rows["never"]["status"] == "no time left"
    assert torch.cuda.is_available() or gpu.main([]) == 2


def test_once_more_with_another_assembler(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "assemblers", lambda: {"/old/ptxas": (12, 8), "/new/ptxas": (13, 4)})
    monkeypatch.setattr(preflight, "in_use", lambda: (12, 8))
    needs = 'test "$TRITON_PTXAS_PATH" = /new/ptxas'
    code, rows = follow(
        [shell("first", needs, test=True, again=True), shell("later", needs, test=True)], tmp_path / "a"
    )
    assert code == 0, "the second try counts"
    assert list(rows) == ["first", "first, ptxas 13.4", "later"]
    assert [row["status"] for row in rows.values()] == ["error: exit code 1", "ok", "ok"]
    code, rows = follow([shell("first", "false", test=True, again=True), shell("later", f"! {needs}")], tmp_path / "b")
    assert code == 1 and rows["later"]["status"] == "ok", "one that does not help is not kept"
    monkeypatch.setattr(preflight, "in_use", lambda: (13, 4))
    code, rows = follow([shell("first", "false", test=True, again=True)], tmp_path / "c")
    assert code == 1 and list(rows) == ["first"]


TESTS = """
    import os, pytest

    @pytest.fixture
    def seven(monkeypatch):
        monkeypatch.setenv("SEVEN", "7")
        yield 7
        assert os.environ["SEVEN"] == "7"

    @pytest.mark.parametrize("b", ["x", pytest.param("y", id="why", marks=pytest.mark.skipif(True, reason="not y"))])
    @pytest.mark.parametrize(("a", "c"), [(1, 2), (3, 4)])
    def test_params(a, c, b, seven):
        assert c == a + 1 and b == "x" and seven == 7

    def test_raises(tmp_path):
        with pytest.raises(ValueError, match="b.d"):
            raise ValueError("bad")
        assert "SEVEN" not in os.environ and tmp_path.exists()

    def test_fails():
        assert 1 == 2, "one is not two"

    @pytest.mark.long
    def test_long():
        raise AssertionError

    def test_skips():
        pytest.skip("not here")

    def test_ends_the_process():
        os._exit(3)
"""


def test_failing_tests_are_named_whatever_happens(tmp_path) -> None:
    """One fails, one ends its process; tests are run by the stand-in for pytest."""
    file = tmp_path / "some_cases.py"
    file.write_text(textwrap.dedent(TESTS))
    command = [sys.executable, "-m", "perf.testrun", "--step", "some", "--first", "raises", str(file)]
    code, rows = follow([Step("some", command, 60.0, test=True)], tmp_path / "out", 90.0)
    found = {row["case"].partition("::")[2]: row["status"] for row in records(tmp_path / "out" / "tests.csv")}
    assert code == 1 and rows["some"]["status"] == "error: exit code 1"
    assert list(found)[:5] == ["test_raises", *(f"test_params[{x}]" for x in ("1-2-x", "1-2-why", "3-4-x", "3-4-why"))]
    assert found.pop("test_fails").startswith("error: AssertionError: one is not two (some_cases.py:")
    assert found.pop("test_ends_the_process") == testrun.RUNNING
    assert {status for name, status in found.items() if "why" in name} == {"skipped: not y"}
    assert found["test_long"] == "skipped: long" and found["test_skips"] == "skipped: not here"
    assert [found[f"test_params[{v}-x]"] for v in ("1-2", "3-4")] == ["ok", "ok"] and found["test_raises"] == "ok"
    for name in ("test_fails", "test_ends_the_process"):
        assert name in rows["some"]["note"], "a failing test is named where steps are"
    assert standin.mark.long is not None and len(list((tmp_path / "out").iterdir())) <= 8


def test_a_failed_self_check_is_a_failed_step(monkeypatch, results) -> None:
    monkeypatch.setattr(selfcheck, "verdicts", lambda: {"portable": Verdict(False, "dq is off", 2.5)})
    assert selfcheck.main() == 1
    (row,) = records(results / "kernels.csv")
    assert (row["case"], row["status"], row["note"], row["median_ms"]) == ("portable", "wrong", "dq is off", "2500")
    assert {step.name for step in steps() if step.test} >= {"preflight", "self-checks", "bf16 first"}


def test_every_step_is_rehearsed() -> None:
    """The rehearsal has all steps of any machine, in the same order, each with the same program."""
    of_gpu, of_cpu = ({step.name: step for step in found} for found in (steps(), rehearsal()))
    assert [name for name in of_cpu if name in of_gpu] == list(of_gpu)
    assert set(of_cpu) - set(of_gpu) <= {"properties", "memcheck"}
    for name, step in of_gpu.items():
        program = step.command[step.command.index("-m") + 1]
        assert program == of_cpu[name].command[2], name
    assert sum(step.seconds for step in list(of_gpu.values())[:7]) <= 420, "the most telling ones come in 7 minutes"


NAMES = """
import sys, torch
torch.cuda.is_available = lambda: True  # what the files take themselves to run on
from pathlib import Path
from perf import testrun
print("\\n".join(item.name for path in sys.argv[1:] for item in testrun.collect(Path(path))))
"""


def test_words_of_steps_are_in_names_of_tests() -> None:
    """The words by which steps choose tests, as the tests are called on a GPU: a test that is renamed is not lost."""
    environment = {**os.environ, **UNCHECKED, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", NAMES, *CASES, BOUNDS], env=environment, capture_output=True, text=True)
    names = run.stdout.splitlines()
    assert run.returncode == 0 and names, run.stderr[-2000:]
    for word in (*FIRST, *OTHER_DTYPES[:2], LARGE, "gluon", "test_empty_and_whole_tiles"):
        assert any(word in name for name in names), word


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_rehearsal(tmp_path) -> None:
    """Every step, as `make gpu` takes them."""
    command = [sys.executable, "-m", "perf.gpu", "--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    run = subprocess.run([*command, "--budget", "2900"], env={**os.environ, "PYTHONPATH": os.getcwd()})
    rows = {row["case"]: row for row in records(tmp_path / "out" / "steps.csv")}
    assert {name: row["status"] for name, row in rows.items()} == {step.name: "ok" for step in rehearsal()}
    assert run.returncode == 0 and len(list((tmp_path / "out").iterdir())) <= 8
