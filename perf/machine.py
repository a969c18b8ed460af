"""Where a measurement comes from: the columns about the machine that every row carries."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("torch", "triton", "transformers", "deepspeed")
COLUMNS = [
    *("gpu", "driver", "sm_mhz_max", "power_limit", "cpu", "cores", "threads", "load", "python"),
    *VERSIONS,
    *("commit", "date"),
]


def ask(*command: str) -> str:
    """The first line that a program prints, or "" where there is no such program."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (run.stdout.strip().splitlines() or [""])[0] if run.returncode == 0 else ""


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _still() -> dict[str, Any]:
    """What does not change while the process runs."""
    import torch  # here, so that tables can be checked without it

    query = "driver_version,clocks.max.sm,power.limit"
    found = ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits").split(", ")
    driver, clock, power = found if len(found) == 3 else ("", "", "")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": driver,
        "sm_mhz_max": clock,
        "power_limit": power,
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in VERSIONS},
        "commit": os.environ.get("TRITON_SP_COMMIT") or ask("git", "rev-parse", "--short", "HEAD"),
    }


def describe() -> dict[str, Any]:
    """GPU, driver, clocks, processor, how busy it is, versions, date and commit: the columns `COLUMNS`."""
    import torch

    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    moment = {"threads": torch.get_num_threads(), "load": f"{os.getloadavg()[0]:.1f}", "date": now}
    return {name: (_still() | moment)[name] for name in COLUMNS}


def cpu() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def sm_mhz() -> int | None:
    """The clock of the GPU's multiprocessors right now."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = ask("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    return int(found) if found.isdigit() else None


def results(device: torch.device, quick: bool = False) -> Path:
    """The folder of a device's CSVs: that of TRITON_SP_RESULTS, or perf/results/<gpu>/ or perf/results/cpu/, there in
    quick/ for what is no measurement."""
    import torch

    if folder := os.environ.get("TRITON_SP_RESULTS"):
        return Path(folder)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-")
    return ROOT / "perf" / "results" / name / ("quick" if quick else "")
