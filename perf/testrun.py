"""Runs test files on a GPU machine, with or without pytest, and writes each result into tests.csv at once.

    python -m perf.testrun --step NAME [--first WORD ...] [--only WORD ...] [--without WORD ...] FILE ...

A word selects tests whose name, with file and parameters, holds it. A test that ends the process, or is stopped in it,
is in the file as one that was running. Started again with the same `--step`, it goes on behind that test.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from perf import standin
from perf.contest import LOST, Settings, lost
from perf.rows import Row

RUNNING = "error: the process ended while this test was running"


@dataclass(frozen=True)
class Item:
    """A test function with its parameters."""

    name: str
    function: Callable[..., Any]
    values: dict[str, Any]
    marks: tuple[standin.Mark, ...]
    fixtures: dict[str, Callable[..., Any]]

    @property
    def skip_reason(self) -> str:
        """Why it is not run, or ""."""
        for mark in self.marks:
            if mark.name == "long" or (mark.name == "skipif" and mark.args[0]):
                return mark.kwargs.get("reason", mark.name)
        return ""


def collect(path: Path) -> Iterator[Item]:
    """All tests of a file, in its order."""
    sys.modules["pytest"] = standin  # type: ignore[assignment]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    functions = {name: f for name, f in vars(module).items() if inspect.isfunction(f)}
    fixtures = {name: f for name, f in functions.items() if hasattr(f, "fixture")}
    for name, function in functions.items():
        if not name.startswith("test") or function.__module__ != module.__name__:
            continue
        marks = list(getattr(function, "pytestmark", []))
        rows = [list(_rows(mark)) for mark in marks if mark.name == "parametrize"]
        for chosen in itertools.product(*rows):
            ids = "-".join(row_id for row_id, _, _ in chosen)
            values = {key: value for _, named, _ in chosen for key, value in named.items()}
            more = [mark for _, _, own in chosen for mark in own]
            title = f"{path.name}::{name}" + (f"[{ids}]" if ids else "")
            yield Item(title, function, values, (*marks, *more), fixtures)


def _rows(mark: standin.Mark) -> Iterator[tuple[str, dict[str, Any], tuple[standin.Mark, ...]]]:
    """Name, values and marks of each row of a parametrization."""
    names, values = mark.args
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    ids = mark.kwargs.get("ids")
    for number, value in enumerate(values):
        if not isinstance(value, standin.Param):
            value = standin.param(*(value if len(names) > 1 else [value]))
        if value.id is not None:
            name = value.id
        elif isinstance(ids, list | tuple):
            name = ids[number]
        else:
            name = "-".join(str(x).removeprefix("torch.") for x in value.values)
        yield name, dict(zip(names, value.values, strict=True)), value.marks


def run(test: Item, shared: dict[str, Any]) -> None:
    """One test, with its fixtures; raises what it raises."""
    with ExitStack() as stack:
        made: dict[str, Any] = dict(test.values)

        def make(name: str) -> Any:
            if name not in made:
                made[name] = _make(name, test, shared, stack, make)
            return made[name]

        for name, function in test.fixtures.items():
            if function.fixture.get("autouse"):
                make(name)
        test.function(**{name: make(name) for name in inspect.signature(test.function).parameters})


def _make(name: str, test: Item, shared: dict[str, Any], stack: ExitStack, make: Callable[[str], Any]) -> Any:
    """A fixture's value; what it leaves behind is on the stack."""
    if name == "monkeypatch":
        return standin.MonkeyPatch(stack)
    if name == "tmp_path":
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if name == "ranks":  # processes that stay alive between tests, as in tests/conftest.py
        if name not in shared:
            shared[name] = importlib.import_module("triton_sp.testing").RankPool()
        return shared[name]
    function = test.fixtures[name]
    value = function(**{key: make(key) for key in inspect.signature(function).parameters})
    if inspect.isgenerator(value):
        stack.callback(next, value, None)
        return next(value)
    return value


def result(test: Item, shared: dict[str, Any]) -> tuple[str, BaseException | None]:
    """Its status in the file, and what it raised."""
    if reason := test.skip_reason:
        return f"skipped: {reason}", None
    try:
        run(test, shared)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except standin.Skipped as reason:
        return f"skipped: {reason}", None
    except Exception as error:  # whatever a test may raise
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        return f"error: {type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno})", error
    return "ok", None


def select(tests: Sequence[Item], first: Sequence[str], only: Sequence[str], without: Sequence[str]) -> list[Item]:
    """The tests that are asked for, those that hold a word of `first` before the others."""
    chosen = [t for t in tests if any(w in t.name for w in only or [""]) and not any(w in t.name for w in without)]
    return sorted(chosen, key=lambda t: next((i for i, word in enumerate(first) if word in t.name), len(first)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a test has failed, LOST if the GPU takes no more work from this process."""
    parser = argparse.ArgumentParser("perf.testrun", description=__doc__)
    parser.add_argument("--step", required=True)
    parser.add_argument("--after", default="", help="a step: what passed in it is left out")
    for name in ("--first", "--only", "--without"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("files", nargs="+", type=Path)
    parsed = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, quick=device.type == "cpu")
    report, failed, shared = settings.report("tests"), False, dict[str, Any]()
    tests = select([t for path in parsed.files for t in collect(path)], parsed.first, parsed.only, parsed.without)
    code = 0
    for test in tests:
        row = Row("test", parsed.step, test.name, "", device=settings.device.type, clock="wall")
        if report.status(replace(row, provider=parsed.after)) == "ok":
            continue
        if (known := report.status(row)) is not None:
            failed |= known.startswith("error")
            continue
        row.status = RUNNING
        report.add([row])
        begin = time.monotonic()
        row.status, error = result(test, shared)
        row.median_ms = 1e3 * (time.monotonic() - begin)
        report.add([row])
        print(f"{row.status.split(':')[0]:8} {row.median_ms / 1e3:6.1f} s  {test.name}", flush=True)
        failed |= error is not None
        if error is not None and lost(error):
            code = LOST
            break
    if "ranks" in shared:
        shared["ranks"].close()
    return code or int(failed)


if __name__ == "__main__":
    sys.exit(main())
