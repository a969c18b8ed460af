"""Everything that needs a GPU, in one command (`make gpu`), well inside 10 minutes; CSV under perf/results/<gpu>/.

Needs PyTorch, Triton and pytest, and no network. A step that fails or runs out of its time does not stop the others;
the exit status is that of the tests.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time

import torch
from machine import ROOT, Report

PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-c",
    os.devnull,
    "--rootdir=.",
    "--noconftest",
    "-q",
    "-p",
    "no:cacheprovider",
]
# What calls the Gluon tier takes, once more with it, where its self-check has passed.
ON_GLUON = ["tests/attend_cases.py", "-k", "gluon or head_dims or test_masks or nan or strides or whole or graph"]
SANITIZED = ["tests/attend_cases.py", "-k", "test_strides or test_keys_left_out or test_empty_and_whole"]


def steps() -> dict[str, tuple[list[str], float]]:
    """Name -> command and the seconds it may take."""
    cases = ["tests/attend_cases.py"]
    if importlib.util.find_spec("hypothesis"):
        cases.append("tests/attend_properties.py")
    found = {
        "tests": ([*PYTEST, *cases, "--durations=5"], 260.0),
        "narrow products": ([sys.executable, "perf/narrow_products.py"], 30.0),
        "attend": ([sys.executable, "perf/attend.py", "80"], 100.0),
        "gluon": ([sys.executable, "perf/gluon.py", "15"], 75.0),
        "tests on gluon": ([*PYTEST, *ON_GLUON], 40.0),
    }
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", *PYTEST, *SANITIZED]
            found[tool] = (command, 45.0)
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu needs a GPU that PyTorch can see; there is none here")
        return 2
    # The repository is found without being installed; the kernels' own choice of device must not be overridden.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    report, status = Report("steps", ["step", "result", "seconds"]), 1
    for name, (command, limit) in steps().items():
        start = time.monotonic()
        # The portable kernels are proven and timed as such, whatever an earlier run has recorded of the Gluon tier.
        environment["TRITON_SP_GLUON"] = "1" if "gluon" in name else "0"
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
        result = {0: "passed", -1: "out of time"}.get(code, f"failed ({code})")
        report.add(step=name, result=result, seconds=round(time.monotonic() - start, 1))
        status = code if name == "tests" else status
    return status


if __name__ == "__main__":
    sys.exit(main())
