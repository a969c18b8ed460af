"""The catalogue of what can go wrong on a rank. Each case returns the right result on every rank, or raises an error on
every rank that is left. `make faults` runs all of them on 2 and 4 ranks and writes reports/faults.csv."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import faults_raised
import faults_right
import faults_waiting
import torch
from fault import Fault

from triton_sp import errors
from triton_sp.testing import RankError, RankPool

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
        fine, told = all(kind == "result" for kind, _, _ in answers.values()), "right result"
    else:
        fine = all(isinstance(error, fault.raises) for error in found) and len(others) >= ranks - 1
        fine &= not fault.names_rank or all(f"rank {ranks - 1}" in str(error) for error in found)
        told = type(found[0]).__name__
    message = "" if found[0] is None else str(found[0])
    return {"case": name, "ranks": ranks, "outcome": told if fine else f"wrong: {found}", "seconds": round(seconds, 2),
            "message": message, "fine": fine}  # fmt: skip


def tables(pool: RankPool, ranks: int) -> list[dict[str, Any]]:
    """Rows of the tables of values (promises/values.py) and of states and steps (wrappers/test_state.py)."""
    folder = Path(__file__).parents[1]
    sys.path[:0] = [str(folder / "promises"), str(folder / "wrappers")]
    import test_state
    import values

    rows = []
    for name, table in values.TABLES.items():
        answers = pool.run(values.run, name, ranks=ranks, timeout=1000)
        for label, entry in table.items():
            found = [answer[label][1] for answer in answers]
            fine = all(isinstance(error, errors.InputError) and error.field == entry.field for error in found)
            rows.append(_row(f"{name}: {label}", ranks, found, fine))
    for label, late in [(label, late) for label in test_state.CHANGES for late in (False, True)]:
        found = [answer[label, late] for answer in pool.run(test_state.run, [label], ranks=ranks, timeout=1000)]
        fine = all(isinstance(error, errors.DisagreementError) for error in found)
        rows.append(_row(f"a rank has {label}{', after a step' if late else ''}", ranks, found, fine))
    answers = pool.run(test_state.run_steps, ranks=ranks, timeout=1000)
    for label in test_state.STEPS:
        found = [answer[label] for answer in answers]
        rows.append(
            _row(f"steps: {label}", ranks, found, all(isinstance(error, errors.DisagreementError) for error in found))
        )
    return rows


def _row(case: str, ranks: int, found: list[Any], fine: bool) -> dict[str, Any]:
    told = type(found[0]).__name__ if fine else f"wrong: {found}"
    return {"case": case, "ranks": ranks, "outcome": told, "message": str(found[0]), "fine": fine}


def main() -> int:
    """Run all cases and write the table; 0 if every one came out as it should."""
    import pandas as pd
    from tqdm import tqdm

    pool, path = RankPool(), Path(__file__).parents[2] / "reports" / "faults.csv"
    rows = [row for ranks in (2, 4) for row in tables(pool, ranks)]
    rows += [outcome(pool, name, ranks) for ranks in (2, 4) for name in tqdm(FAULTS, desc=f"{ranks} ranks")]
    pool.close()
    path.parent.mkdir(exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False)
    print(table.drop(columns=["message", "fine"]).to_string(index=False))
    return int(not table["fine"].all())


if __name__ == "__main__":
    raise SystemExit(main())
