"""The one schema of every CSV under perf/results/, and the file that is written row by row.

A row is a stage, a provider and a case; `KEY` tells which columns make it the same measurement again, whoever's
commit it was. Times are in milliseconds, sizes in bytes, work in FLOPs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf import machine

if TYPE_CHECKING:
    import pandas as pd  # not at run time: what only writes rows does not need it


@dataclass
class Row:
    """One measurement of one provider.

    Attributes:
        stage: as in stages.py (pack, exchange, attend, unpack, ...), "model" for all of them, "rate" for what the
            machine reaches in large products and copies.
        case: a real model's name and the batch, see cases.py.
        kind: "measured"; "modelled", by a formula or on a stand-in for P ranks; "published" by others, see `note`.
        tokens, segments, longest: of the whole stream; the longest segment.
        status: "ok"; "wrong", if its error is more than the tolerance: its time is then no peer's time; or the error.
        clock: what measured the times: "cuda events", "cpu" (this process's CPU time) or "wall".
        ratio: the least median of the case's other providers that are right, over this one's: above 1 is faster.
        share: of the matmul rate (work) or the copy rate (bytes) that the same run measured.
        error: relative error against one process in fp32, where whole models are compared.
        error_ratio: largest error against fp32 over that of the textbook in the same dtype; of the worst tensor.
        flops: of attention, or of the product, in this direction; gbps counts bytes read and written.
        sent_bytes: to other ranks. saved_bytes: kept for the backward. memory_bytes: the peak above what was there.
        largest_bytes: of the largest tensor.
    """

    stage: str
    provider: str
    case: str
    direction: str = "forward"
    kind: str = "measured"
    device: str = "cpu"
    dtype: str = "float32"
    ranks: int = 1
    rank: int = 0
    layers: int = 1
    tokens: int = 0
    segments: int = 1
    longest: int = 0
    heads: int = 0
    kv_heads: int = 0
    dim: int = 0
    causal: bool = False
    status: str = "ok"
    note: str = ""
    clock: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int | None = None
    tflops: float | None = None
    gbps: float | None = None
    ratio: float | None = None
    share: float | None = None
    error: float | None = None
    error_ratio: float | None = None
    flops: float | None = None
    collectives: str = ""
    layer_collectives: str = ""
    sent_bytes: int | None = None
    saved_bytes: int | None = None
    memory_bytes: int | None = None
    largest_bytes: int | None = None
    sm_mhz_before: int | None = None
    sm_mhz_after: int | None = None


RESULTS = [field.name for field in fields(Row)]
KEY = RESULTS[: RESULTS.index("status")]
COLUMNS = [*RESULTS, *machine.COLUMNS]


def text(value: Any) -> str:
    """How a value stands in the file.

    >>> text(None), text(0.123456789), text(7), text("two\\nlines")
    ('', '0.123457', '7', 'two lines')
    """
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


class Report:
    """A CSV that holds all rows so far at any moment: each one added replaces the file as a whole.

    What is in the file already counts as done, so that a run that was cut short goes on where it stopped.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path, self.machine = path, machine.describe()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists() and not fresh:
            for row in records(path):
                self._rows[tuple(row[name] for name in KEY)] = row

    def status(self, row: Row) -> str | None:
        """What became of this measurement, or None where there is none yet; only the key of `row` is read."""
        found = self._rows.get(self._key(row))
        return None if found is None else found["status"]

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows; one with the key of an older row takes its place."""
        for row in rows:
            values = {name: text(value) for name, value in (asdict(row) | self.machine).items()}
            self._rows[self._key(row)] = values
        temporary = self.path.with_suffix(".partial")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self._rows.values())
        os.replace(temporary, self.path)

    @staticmethod
    def _key(row: Row) -> tuple[str, ...]:
        return tuple(text(getattr(row, name)) for name in KEY)


def records(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as they are written, or none of them where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> pd.DataFrame:
    """The same as a table."""
    import pandas as pd

    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
