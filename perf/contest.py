"""Providers side by side: who fails, who is wrong, how fast the others are, and beside which rate of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from perf import machine
from perf.clock import Clock, statistics
from perf.rows import Report, Row

LOST = 3  # the exit code of a sweep whose GPU takes no more work from this process; it can be started again


@dataclass
class Settings:
    """How a sweep is run.

    Attributes:
        quick: few and small cases, to try everything out.
        fresh: measure what is in the file already once more.
        budget: seconds after which no further case begins.
        slow: also measure peers that compile for many seconds.
        part: of the sweep "kernels": "headline", "packs" or "rest"; "" for all of it.
    """

    device: torch.device
    quick: bool = False
    fresh: bool = False
    budget: float = math.inf
    slow: bool = False
    part: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began > self.budget

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def repeats(self) -> int:
        if self.quick or self.device.type == "cpu":
            return 5
        return 10 if self.part == "headline" else 20

    @property
    def case_seconds(self) -> float:
        """What the turns of one case may take."""
        if self.quick:
            return 2.0
        return 5.0 if self.part == "headline" else 15.0

    def report(self, name: str) -> Report:
        """The CSV of a sweep. Quick ones go elsewhere: they are no measurements."""
        return Report(machine.results(self.device, self.quick) / f"{name}.csv", self.fresh)

    def columns(self) -> dict[str, Any]:
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass
class Entry:
    """A provider that is ready: what its row says so far, what to time, and the bytes that it must read and write."""

    row: Row
    run: Callable[[], Any]
    bytes: int = 0


def failure(error: BaseException) -> str:
    """The status of a provider that raised.

    >>> failure(ValueError("no kernel for this head dim"))
    'error: ValueError: no kernel for this head dim'
    """
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "error: out of memory"
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def lost(error: BaseException) -> bool:
    """Whether an error means that the GPU takes no more work from this process."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Rates:
    """What the machine reaches in this run: TFLOP/s of a large product, GB/s of a large copy (read and written)."""

    matmul: float
    copy: float


def timed(entries: Sequence[Entry], clock: Clock, rates: Rates, settings: Settings) -> list[Row]:
    """The rows of the entries, timed in turns."""
    before = machine.sm_mhz()
    taken = clock.turns({str(i): e.run for i, e in enumerate(entries)}, settings.repeats, settings.case_seconds)
    after = machine.sm_mhz()
    rows = []
    for entry, times in zip(entries, taken.values(), strict=True):
        row = replace(entry.row, clock=clock.name, sm_mhz_before=before, sm_mhz_after=after, **statistics(times))
        seconds = max(row.median_ms or 0.0, 1e-6) / 1e3
        if row.flops:
            row.tflops = row.flops / seconds / 1e12
            row.share = row.tflops / rates.matmul
        if entry.bytes:
            row.gbps = entry.bytes / seconds / 1e9
            row.share = max(row.share or 0.0, row.gbps / rates.copy)
        rows.append(row)
    return rows


def ranked(rows: list[Row]) -> list[Row]:
    """The rows of one case with their ratio to the best of the others: what is wrong is nobody's peer."""
    for row in rows:
        others = [o for o in rows if o is not row and o.direction == row.direction and o.status == "ok"]
        if others and row.status == "ok" and row.median_ms:
            row.ratio = min(o.median_ms or math.inf for o in others) / row.median_ms
    return rows


def compete(entries: Sequence[Entry], clock: Clock, rates: Rates, settings: Settings) -> list[Row]:
    """`timed` and `ranked`."""
    return ranked(timed(entries, clock, rates, settings))


def measure_rates(clock: Clock, settings: Settings) -> tuple[Rates, list[Row]]:
    """The rates, and their rows: they are measured in each run, whatever is in the file."""
    device, dtype, small = settings.device, settings.dtype, settings.quick or settings.device.type == "cpu"
    side, size = (512, 1 << 24) if small else (8192, 1 << 32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would run faster
    source = torch.randint(-128, 127, (size,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    base = Row("rate", "torch", "", **settings.columns())
    product = replace(base, case=f"product of {side} x {side}", flops=2 * side**3)
    copy = replace(base, case=f"copy of {size >> 20} MiB")
    entries = [Entry(product, lambda: torch.mm(a, b)), Entry(copy, lambda: target.copy_(source), 2 * size)]
    rows = []
    for entry in entries:
        rows += timed([entry], clock, Rates(math.inf, math.inf), settings)
    for row in rows:
        row.share = None
    return Rates(rows[0].tflops or math.nan, rows[1].gbps or math.nan), rows
