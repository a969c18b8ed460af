"""Where a measurement comes from: the columns that every CSV under perf/results/ carries."""

from __future__ import annotations

import csv
import datetime
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def ask(*command: str) -> str:
    """The first line that a program prints, or "unknown" where there is no such program."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (run.stdout.strip().splitlines() or ["unknown"])[0] if run.returncode == 0 else "unknown"


def describe() -> dict[str, Any]:
    """GPU, driver, clock, versions, date and commit."""
    import triton

    query = "driver_version,clocks.max.sm,clocks.sm,power.limit"
    driver, max_clock, clock, power = (
        ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split(", ") * 4
    )[:4]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver,
        "sm_clock": clock,
        "sm_clock_max": max_clock,
        "power_limit": power,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("TRITON_SP_COMMIT") or ask("git", "rev-parse", "--short", "HEAD"),
    }


def cpu() -> str:
    """What the processor calls itself."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def folder() -> pathlib.Path:
    """perf/results/<gpu>/, or perf/results/cpu/ where there is none; made if need be."""
    name = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = pathlib.Path(os.environ.get("TRITON_SP_RESULTS", ROOT / "perf" / "results")) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


class Report:
    """A CSV that is written row by row, so that a run cut short keeps what it measured."""

    def __init__(self, name: str, fields: Sequence[str]) -> None:
        self.path, self.machine = folder() / f"{name}.csv", describe()
        self.fields = [*fields, *self.machine]
        self._write("w", dict(zip(self.fields, self.fields, strict=True)))

    def add(self, **row: Any) -> None:
        """One row, whose missing fields stay empty."""
        self._write("a", row | self.machine)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)

    def _write(self, mode: str, row: dict[str, Any]) -> None:
        with open(self.path, mode, newline="") as file:
            csv.DictWriter(file, self.fields, lineterminator="\n").writerow(row)
