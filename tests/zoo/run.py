"""`make zoo`: every class of transformers' mappings on 2 and 3 ranks, a class after the other.

Writes reports/zoo.csv as it goes and goes on where it stopped; `--table` makes docs/models.md and the list of exact
classes of it.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import transformers as hf
from zoo.build import KINDS, classes
from zoo.verdict import Verdict, judge

from triton_sp.testing import RankError, RankPool

ROOT = Path(__file__).parents[2]
REPORT, TABLE, EXACT = ROOT / "reports/zoo.csv", ROOT / "docs/models.md", ROOT / "tests/data/zoo_exact.txt"
TIMEOUT = 150.0  # seconds for a class on a number of ranks
TITLES = {"vlm": "Image and text to text", "causal": "Causal language models", "vision": "Vision encoders"}
INTRODUCTION = (
    "Classes of three mappings of transformers {version}, tiny and with random weights, on {sizes} ranks with",
    '`plan="heads"` and more rows than ranks, against one process: the loss, and the gradient of every parameter, in',
    "float64. `make zoo` makes this page. Configurations are the default ones made small: what a released checkpoint",
    "switches on beside them is not in these figures. *routed*: no rank holds all features; *gathered*, *made whole*:",
    "every rank does. *refused*: by an error that names the part. *not built*: the tiny model does not run in one",
    "process with the configuration or the batch made for it, so nothing is known of it.",
)
NAMES = [field.name for field in fields(Verdict)]


def judge_on_ranks(pool: RankPool, model_type: str, name: str, kind: str, size: int) -> Verdict:
    """The verdict of all ranks: the first that is not exact."""
    try:
        verdicts = pool.run(judge, model_type, name, kind, size, ranks=size, timeout=TIMEOUT)
    except TimeoutError as error:
        return Verdict(model_type, name, kind, size, "hang", reason=str(error))
    except RankError as error:
        return Verdict(model_type, name, kind, size, "crash", reason=str(error)[-300:])
    order = ["crash", "wrong", "not built", "refused", "exact"]
    return min(verdicts, key=lambda found: order.index(found.verdict))


def read_report() -> dict[tuple[str, int], Verdict]:
    """By the name of the class and the number of ranks; the last line of a class counts."""
    if not REPORT.exists():
        return {}
    with REPORT.open() as file:
        found = list(csv.DictReader(file))
    rows = [Verdict(**row | {"ranks": int(row["ranks"]), "error": float(row["error"])}) for row in found]  # type: ignore
    return {(row.name, row.ranks): row for row in rows}


def run(kinds: list[str], sizes: list[int], only: list[str], again: set[str]) -> None:
    """Judge what the report does not have yet, or has with one of these verdicts."""
    known, pool = read_report(), RankPool()
    REPORT.parent.mkdir(exist_ok=True)
    new = not REPORT.exists()
    with REPORT.open("a", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        if new:
            writer.writeheader()
        for kind in kinds:
            for model_type, name in classes(kind):
                for size in sizes:
                    before = known.get((name, size))
                    if (only and model_type not in only) or (before is not None and before.verdict not in again):
                        continue
                    verdict = judge_on_ranks(pool, model_type, name, kind, size)
                    writer.writerow(asdict(verdict))
                    file.flush()
                    print(size, verdict.verdict, model_type, name, verdict.error, verdict.reason[:160], flush=True)
                    if verdict.verdict == "not built":
                        break
    pool.close()


def worst_of(rows: list[Verdict]) -> Verdict:
    """One verdict of those on several numbers of ranks."""
    order = ["wrong", "hang", "crash", "refused", "not built", "exact"]
    return min(rows, key=lambda row: (order.index(row.verdict), -row.error))


def write_table() -> None:
    """docs/models.md and tests/data/zoo_exact.txt, from the report."""
    by_name: dict[str, list[Verdict]] = {}
    for row in read_report().values():
        by_name.setdefault(row.name, []).append(row)
    worst = [worst_of(rows) for rows in by_name.values()]
    judged = {row.name: row.verdict for row in worst}
    before = set(EXACT.read_text().split()) if EXACT.exists() else set()
    lost = sorted(name for name in before if judged.get(name, "exact") != "exact")
    exact = before | {name for name, verdict in judged.items() if verdict == "exact"}
    EXACT.write_text("".join(f"{name}\n" for name in sorted(exact)))
    sizes = " and ".join(sorted({str(row.ranks) for row in read_report().values()}))
    lines = ["# Models", "", *(line.format(version=hf.__version__, sizes=sizes) for line in INTRODUCTION)]
    for kind, title in TITLES.items():
        rows = [row for row in worst if row.kind == kind]
        rows.sort(key=lambda row: (row.verdict != "exact", row.model_type))
        counted = ", ".join(f"{n} {verdict}" for verdict, n in Counter(row.verdict for row in rows).most_common())
        lines += ["", f"## {title}", "", f"{len(rows)} classes: {counted}."]
        lines += ["", "| model_type | class | verdict | tower | features | decoder | worst error or reason |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row.model_type} | {row.name} | {row.verdict} | {row.tower} | {row.features} | {row.decoder} | "
            + (f"{row.error:.1e}" if row.verdict == "exact" else row.reason.replace("|", "/")[:160])
            + " |"
            for row in rows
        ]
    TABLE.write_text("\n".join(lines) + "\n")
    if lost:
        raise SystemExit(f"no longer exact: {', '.join(lost)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL_TYPE")
    parser.add_argument("--again", nargs="+", default=[], metavar="VERDICT")
    parser.add_argument("--table", action="store_true", help="only make the table of the report")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments.kinds, arguments.ranks, arguments.only, set(arguments.again))
    write_table()


if __name__ == "__main__":
    main()
