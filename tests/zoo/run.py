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
    "Classes of three mappings of transformers {version}, tiny and with random weights, on several ranks with",
    '`plan="heads"` and more rows than ranks, against one process: the loss, and the gradient of every parameter, in',
    "float64. `make zoo` makes this page. Configurations are the default ones made small: what a released checkpoint",
    "switches on beside them is not in these figures. *routed*: no rank holds all features; *gathered*, *made whole*:",
    "every rank does. *by images*: of what makes features each rank runs its own images, and does not divide one.",
    "*refused*: by an error that names the part. *not built*: the tiny model does not run in one process with the",
    "configuration or the batch made for it, so nothing is known of it. Dropout and jitter are 0: what is drawn at",
    "random has no one answer. Models that may be decoders or not are decoders. What differs by more than rounding",
    "explains is computed once more with float64 where the model asks for float32. What has routers or masks that hold",
    "only float32 is compared in it. *attention gathered*: what is token-wise runs on a rank's tokens, and every rank",
    "computes all of the layers of attention.",
)
COLUMNS = ["model_type", "class", "verdict", "tower", "features", "decoder", "ranks", "worst error or reason"]
NAMES = [field.name for field in fields(Verdict)]


def judge_on_ranks(pool: RankPool, model_type: str, name: str, kind: str, size: int, timeout: float) -> Verdict:
    """The verdict of all ranks: the first that is not exact."""
    try:
        verdicts = pool.run(judge, model_type, name, kind, size, ranks=size, timeout=timeout)
    except TimeoutError as error:
        return Verdict(model_type, name, kind, size, "hang", reason=str(error))
    except RankError as error:
        return Verdict(model_type, name, kind, size, "crash", reason=str(error)[-300:])
    order = ["crash", "wrong", "not built", "refused", "exact"]
    return min(verdicts, key=lambda found: order.index(found.verdict))


def read_report() -> dict[tuple[str, str, int], Verdict]:
    """By kind, name of the class and number of ranks; the last line of a class counts."""
    if not REPORT.exists():
        return {}
    with REPORT.open() as file:
        found = list(csv.DictReader(file))
    rows = [Verdict(**row | {"ranks": int(row["ranks"]), "error": float(row["error"])}) for row in found]  # type: ignore
    return {(row.kind, row.name, row.ranks): row for row in rows}


def run(kinds: list[str], sizes: list[int], only: list[str], again: set[str], timeout: float) -> None:
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
                    before = known.get((kind, name, size))
                    if (only and model_type not in only) or (before is not None and before.verdict not in again):
                        continue
                    verdict = judge_on_ranks(pool, model_type, name, kind, size, timeout)
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


def read_table() -> dict[tuple[str, str], list[str]]:
    """The cells of each line of docs/models.md, by kind and name of the class: what the report does not have stays."""
    lines, kind, kinds = {}, "", {f"## {title}": kind for kind, title in TITLES.items()}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else ():
        kind = kinds.get(line, kind)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == len(COLUMNS) and cells[0] not in (COLUMNS[0], "---"):
            lines[kind, cells[1]] = cells
    return lines


def cells_of(rows: list[Verdict]) -> list[str]:
    """The line of a class in docs/models.md."""
    row = worst_of(rows)
    told = f"{row.error:.1e}" if row.verdict == "exact" else row.reason.replace("|", "/")[:160].strip()
    ranks = ", ".join(str(size) for size in sorted(row.ranks for row in rows))
    return [row.model_type, row.name, row.verdict, row.tower, row.features, row.decoder, ranks, told]


def joined(cells: list[str], before: list[str] | None) -> list[str]:
    """A line, with the numbers of ranks on which the class was exact before; the worst of their errors, unless all were
    judged again."""
    if before is None or not cells[2] == before[2] == "exact" or {*before[6].split(", ")} <= {*cells[6].split(", ")}:
        return cells
    ranks = sorted({*cells[6].split(", "), *before[6].split(", ")})
    return [*cells[:6], ", ".join(ranks), max(cells[7], before[7], key=float)]


def write_table() -> None:
    """docs/models.md and tests/data/zoo_exact.txt, from the report and, where it has nothing, as they were."""
    judged: dict[tuple[str, str], list[Verdict]] = {}
    for row in read_report().values():
        judged.setdefault((row.kind, row.name), []).append(row)
    lines = read_table()
    lines |= {key: joined(cells_of(rows), lines.get(key)) for key, rows in judged.items()}
    before = set(EXACT.read_text().split()) if EXACT.exists() else set()
    exact = {name for (_, name), cells in lines.items() if cells[2] == "exact"}
    lost = sorted(before & {name for (_, name), cells in lines.items() if cells[2] != "exact"})
    EXACT.write_text("".join(f"{name}\n" for name in sorted(before | exact)))
    page = ["# Models", "", *(line.format(version=hf.__version__) for line in INTRODUCTION)]
    for kind, title in TITLES.items():
        rows = [cells for key, cells in lines.items() if key[0] == kind]
        rows.sort(key=lambda cells: (cells[2] != "exact", cells[0]))
        counted = ", ".join(f"{n} {verdict}" for verdict, n in Counter(cells[2] for cells in rows).most_common())
        page += ["", f"## {title}", "", f"{len(rows)} classes: {counted}."]
        page += ["", *(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows))]
    TABLE.write_text("\n".join(page) + "\n")
    if lost:
        raise SystemExit(f"no longer exact: {', '.join(lost)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL_TYPE")
    parser.add_argument("--again", nargs="+", default=[], metavar="VERDICT")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a class on a number of ranks")
    parser.add_argument("--table", action="store_true", help="only make the table of the report")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments.kinds, arguments.ranks, arguments.only, set(arguments.again), arguments.timeout)
    write_table()


if __name__ == "__main__":
    main()
