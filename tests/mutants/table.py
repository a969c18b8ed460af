"""What `make mutants` examines, with which tests, and the tables that it leaves: one for docs/proof.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from tools.marked import filled

DATA = Path(__file__).resolve().parents[1] / "data"

# Module: the tests that are run against each of its mutants. Tests with ranks come first, as these are forked then.
PLAN = [f"tests/plan/test_{name}.py" for name in ("segments", "cost", "heads")]
QUICK = ["-k", "not interpreter and not compiled and not kernels"]  # without Triton
ALONE = ("cross_entropy", "no_token_and_masked_words", "fp32_exists_by_the_chunk", "head")  # in one process
TOWERS = ("llava", "qwen2_5_vl", "llava_onevision")  # features of images, of patches, of frames
PARITY = [f"tests/promises/test_parity.py::test_parity[{name}-3]" for name in TOWERS]
MODULES: dict[str, list[str]] = {
    "triton_sp/plan/shards.py": ["tests/plan/test_shards.py"],
    "triton_sp/plan/segments.py": PLAN,
    "triton_sp/plan/heads.py": ["tests/plan/test_heads.py"],
    "triton_sp/plan/cost.py": ["tests/plan/test_cost.py"],
    "triton_sp/plan/boxes.py": ["tests/plan/test_heads.py"],
    "triton_sp/plan/recurrence.py": ["tests/plan/test_recurrence.py"],
    "triton_sp/plan/stream.py": ["tests/plan/test_stream.py"],
    "triton_sp/loss.py": ["tests/test_shares.py", *(f"tests/test_loss.py::test_{name}" for name in ALONE)],
    "triton_sp/ops/pack.py": ["tests/ops/test_twins.py", "tests/kernels/test_pack.py", *QUICK],
    "triton_sp/ops/splice.py": ["tests/ops/test_twins.py", "tests/kernels/test_splice.py", *QUICK],
    "triton_sp/ops/reference.py": [
        "tests/ops/test_twins.py",
        "tests/kernels/test_pack.py",
        "tests/plan/test_heads.py",
        *QUICK,
    ],
    "triton_sp/ranks/collectives.py": ["tests/ranks/test_buckets.py", "tests/ranks/test_agreement.py"],
    "triton_sp/ranks/agreement.py": ["tests/ranks/test_agreement.py"],
    "triton_sp/ranks/failures.py": ["tests/ranks/test_board.py"],
    "triton_sp/ranks/waiting.py": ["tests/ranks/test_waiting.py", "tests/ranks/test_board.py"],
    "triton_sp/wrappers/inputs/layout.py": ["tests/wrappers/test_spans.py", "tests/wrappers/test_layout.py"],
    "triton_sp/wrappers/towers/tower.py": ["tests/wrappers/test_rows.py", *PARITY],
    "triton_sp/wrappers/fusion/features.py": ["tests/wrappers/test_rows.py", *PARITY],
}


class Count(NamedTuple):
    """Of one module: how many mutants there are, were tried, were noticed, and cannot be noticed."""

    module: str
    mutants: int
    sampled: int
    killed: int
    equivalent: int

    @property
    def share(self) -> float:
        """The part of the mutants that was noticed, of those that can be."""
        return self.killed / max(self.sampled - self.equivalent, 1)


class Table:
    """Rows of text in a file of tests/data."""

    def __init__(self, name: str, header: tuple[str, ...]) -> None:
        self.file, self.header = DATA / name, header

    def rows(self) -> list[list[str]]:
        """All rows but the header."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as file:
            return list(csv.reader(file))[1:]

    def put(self, count: Count) -> None:
        """Write the row of a module, in the order of MODULES."""
        kept = {row[0]: row for row in self.rows()} | {count.module: [str(value) for value in count]}
        with self.file.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.header)
            writer.writerows(kept[module] for module in MODULES if module in kept)


COUNTS = Table("mutants.csv", Count._fields)
EQUIVALENT = Table("mutants_equivalent.csv", ("module", "before", "after", "why"))


def counts() -> list[Count]:
    """What the last examinations found."""
    return [Count(module, *map(int, numbers)) for module, *numbers in COUNTS.rows()]


DOCUMENT = DATA.parents[1] / "docs" / "proof.md"


def written(text: str) -> str:
    """A document with the table as the counts have it."""
    lines = ["| module | mutants | tried | change no result | of the others, noticed |", "|---|---|---|---|---|"]
    lines += [f"| `{c.module}` | {c.mutants:,} | {c.sampled} | {c.equivalent} | {c.share:.0%} |" for c in counts()]
    return filled(text, "mutants", lines)
