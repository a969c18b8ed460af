"""The catalogue of what can go wrong on a rank. Each case returns the right result on every rank, or raises an error on
every rank that is left. `make faults` runs all of them on 2 and 4 ranks and writes reports/faults.csv."""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faults_raised
import faults_right
import faults_waiting
import torch
from fault import Fault

from tools.marked import filled
from triton_sp import errors
from triton_sp.testing import RankError, RankPool

ROOT = Path(__file__).parents[2]
REPORT, KEPT, DOCUMENT = (ROOT / name for name in ("reports/faults.csv", "tests/data/faults.csv", "docs/proof.md"))
COLUMNS = ("case", "ranks", "outcome", "seconds", "message")
SIZES = (2, 4)  # ranks
RIGHT = "right result"
FAULTS: dict[str, Fault] = {**faults_right.FAULTS, **faults_raised.FAULTS, **faults_waiting.FAULTS}


def on_rank(name: str) -> tuple[str, BaseException | None, float]:
    """What came of a case on this rank, and after how many seconds."""
    torch.manual_seed(0)
    start = time.monotonic()
    try:
        FAULTS[name].run()
    except BaseException as error:
        plain = copy.copy(error) if isinstance(error, errors.SPError) else RuntimeError(repr(error))
        plain.__cause__ = plain.__traceback__ = None
        return "error", plain, time.monotonic() - start
    return "result", None, time.monotonic() - start


def ready() -> None:
    """Started, and everything imported."""


def outcome(pool: RankPool, name: str, ranks: int) -> dict[str, Any]:
    """A row of the catalogue."""
    fault, answers = FAULTS[name], {}
    pool.run(ready, ranks=ranks, timeout=1000)
    try:
        answers = dict(enumerate(pool.run(on_rank, name, ranks=ranks, timeout=60)))
    except RankError as raised:  # one that was killed: the others' answers are lost with it, unless they are kept here
        answers = {rank: answer for rank, answer in enumerate(raised.results) if rank not in raised.errors}
    except TimeoutError:
        return {"case": name, "ranks": ranks, "outcome": "hang", "seconds": 60.0, "message": "", "fine": False}
    others = {rank: answer for rank, answer in answers.items() if rank != ranks - 1} or answers
    seconds = max(answer[2] for answer in others.values())
    found = [error for _, error, _ in others.values()]
    if fault.raises is None:
        fine, told = all(kind == "result" for kind, _, _ in answers.values()), RIGHT
    else:
        fine = all(isinstance(error, fault.raises) for error in found) and len(others) >= ranks - 1
        fine &= not fault.names_rank or all(f"rank {ranks - 1}" in str(error) for error in found)
        told = type(found[0]).__name__
    message = "" if found[0] is None else str(found[0])
    return {"case": name, "ranks": ranks, "outcome": told if fine else f"wrong: {found}", "seconds": round(seconds, 2),
            "message": message, "fine": fine}  # fmt: skip


def others() -> tuple[Any, Any]:
    """The modules of two more tables: of values in batches, and of states and steps of ranks."""
    for folder in ("promises", "wrappers"):
        if str(ROOT / "tests" / folder) not in sys.path:
            sys.path.append(str(ROOT / "tests" / folder))
    import test_state
    import values

    return values, test_state


def catalogue() -> dict[str, type[errors.SPError] | None]:
    """All cases, with the error that is right; None where the result is."""
    values, state = others()
    found = {name: fault.raises for name, fault in FAULTS.items()}
    found |= {f"{name}: {label}": errors.InputError for name, table in values.TABLES.items() for label in table}
    names = [_changed(*key) for key in _changes(state)] + [f"steps: {label}" for label in state.STEPS]
    return found | dict.fromkeys(names, errors.DisagreementError)


def _changes(state: Any) -> list[tuple[str, bool]]:
    return [(label, late) for label in state.CHANGES for late in (False, True)]


def _changed(label: str, late: bool) -> str:
    return f"a rank has {label}{', after a step' if late else ''}"


def tables(pool: RankPool, ranks: int) -> Iterator[dict[str, Any]]:
    """Rows of the tables of values (promises/values.py) and of states and steps (wrappers/test_state.py)."""
    values, state = others()
    for name, table in values.TABLES.items():
        answers = pool.run(values.run, name, ranks=ranks, timeout=1000)
        for label, entry in table.items():
            found = [answer[label][1] for answer in answers]
            fine = all(isinstance(error, errors.InputError) and error.field == entry.field for error in found)
            yield _row(f"{name}: {label}", ranks, found, fine)
    for label, late in _changes(state):
        found = [answer[label, late] for answer in pool.run(state.run, [label], ranks=ranks, timeout=1000)]
        yield _row(_changed(label, late), ranks, found, all(isinstance(e, errors.DisagreementError) for e in found))
    answers = pool.run(state.run_steps, ranks=ranks, timeout=1000)
    for label in state.STEPS:
        found = [answer[label] for answer in answers]
        yield _row(f"steps: {label}", ranks, found, all(isinstance(e, errors.DisagreementError) for e in found))


def _row(case: str, ranks: int, found: list[Any], fine: bool) -> dict[str, Any]:
    told = type(found[0]).__name__ if fine else f"wrong: {found}"
    return {"case": case, "ranks": ranks, "outcome": told, "seconds": "", "message": str(found[0]), "fine": fine}


def kept(file: Path = KEPT) -> list[dict[str, str]]:
    """What the last whole run found."""
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write(file: Path, columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    """Write a table, with some of its columns."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def written(text: str) -> str:
    """A document with the table of the run that is kept: how many cases ended how, and after how long at most."""
    lines = ["| what every rank that is left got | 2 ranks | 4 ranks | seconds |", "|---|---|---|---|"]
    rows = kept()
    for told in sorted({row["outcome"] for row in rows}, key=lambda name: (name != RIGHT, name)):
        own = [row for row in rows if row["outcome"] == told]
        counts = [sum(row["ranks"] == str(ranks) for row in own) for ranks in SIZES]
        seconds = max((float(row["seconds"]) for row in own if row["seconds"]), default=0)
        name = told if told == RIGHT else f"`{told}`"
        lines.append(f"| {name} | {counts[0]} | {counts[1]} | {seconds or ''} |")
    return filled(text, "faults", lines)


def main() -> int:
    """Run cases and write the table; 0 if every one came out as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"run these again, of {list(FAULTS)}; else all, and the other tables")
    parser.add_argument("--keep", action="store_true", help="put the table into tests/data and docs/proof.md")
    arguments = parser.parse_args()
    pool, bad = RankPool(), 0
    REPORT.parent.mkdir(exist_ok=True)
    table: dict[tuple[str, str], Any] = {(row["case"], row["ranks"]): row for row in kept(REPORT) if arguments.cases}
    for ranks in SIZES:
        for row in rows(pool, ranks, arguments.cases):
            table[row["case"], str(ranks)] = row
            write(REPORT, COLUMNS, table.values())
            bad += not row["fine"]
            print(*(row[name] for name in COLUMNS[:-1]), sep=" | ", flush=True)
    pool.close()
    if arguments.keep:
        write(KEPT, COLUMNS[:-1], table.values())
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    return int(bad > 0)


def rows(pool: RankPool, ranks: int, cases: list[str]) -> Iterator[dict[str, Any]]:
    """What some cases come to on so many ranks; all cases if none is named."""
    if not cases:
        yield from tables(pool, ranks)
    for name in cases or FAULTS:
        yield outcome(pool, name, ranks)


if __name__ == "__main__":
    raise SystemExit(main())
