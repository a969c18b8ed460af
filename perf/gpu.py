"""Everything that needs a GPU, in one command (`make gpu`), well inside 10 minutes: tests, then sweeps.

    python -m perf.gpu [--budget SECONDS]

Needs PyTorch, Triton, pytest, pandas and tqdm, and no network. The most telling steps come first, each in a process of
its own with a limit; a step that fails or runs out of time does not stop the others, and what was found is on disk at
any moment: perf/results/<gpu>/steps.csv and kernels.csv. The exit status is 1 if a test failed.
`--device cpu --quick` goes through the same steps in small, on Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from perf import machine
from perf.contest import LOST, Settings
from perf.rows import Report, Row

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# In the kernels' own suite nothing of the models is needed.
CASES = [*PYTEST, "-c", os.devnull, "--rootdir=.", "--noconftest", "tests/kernels/attend_cases.py"]
ON_GLUON = "gluon or head_dims or test_masks or nan or strides or whole or graph"
SANITIZED = "test_strides or test_keys_left_out or test_empty_and_whole"
LARGE = "test_more_than_two_to_the_31_elements"


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and whether it is a test; portable kernels unless `gluon`."""

    name: str
    command: Sequence[str]
    seconds: float
    test: bool = False
    gluon: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def _sweep(name: str, device: str, seconds: float) -> list[str]:
    quick = ["--quick"] if device == "cpu" else []
    return [PYTHON, "-m", "perf.sweep", name, "--device", device, "--budget", f"{seconds:.0f}", *quick]


def steps() -> list[Step]:
    """On a GPU, the most telling first."""
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []  # compiling is what takes time
    cases = [
        *CASES,
        *parallel,
        *(["tests/kernels/attend_properties.py"] if importlib.util.find_spec("hypothesis") else []),
    ]
    found = [
        Step("tests of the kernels", [*cases, "-k", f"not {LARGE}", "--durations=5"], 150, test=True),
        Step("kernels", _sweep("kernels", "cuda", 115), 125),
        Step("parity of two processes on one GPU", [*PYTEST, "-m", "gpu", "tests/promises/test_gpu.py"], 90, test=True),
        Step("gluon's self-check", [PYTHON, "-m", "triton_sp.kernels.hopper.check"], 45, gluon=True),
        Step("tests on gluon", [*CASES, "-k", ON_GLUON], 40, test=True, gluon=True),
        Step("large tensors", [*CASES, "-k", LARGE], 25, test=True),
        Step("tests of the splice", [*CASES[:-1], "tests/kernels/splice_cases.py"], 30, test=True),
        Step("narrow products", [PYTHON, "-m", "perf.narrow_products"], 20),
        Step("single rank", _sweep("single_rank", "cuda", 50), 60),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", *CASES, "-k", SANITIZED]
            found.append(Step(tool, command, 35, test=True))
    return [*found, Step("kernels, the rest", _sweep("kernels", "cuda", 3600), 3600)]


def rehearsal() -> list[Step]:
    """The same kinds of steps in small, on a CPU."""
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return [
        Step("tests of the kernels", [*CASES, "-k", "test_lse"], 120, test=True, environment=interpreter),
        Step("kernels", _sweep("kernels", "cpu", 10), 90),
        Step("parity of two processes on one GPU", [*PYTEST, "-m", "gpu", "tests/promises/test_gpu.py"], 60, test=True),
        Step("gluon's self-check", [PYTHON, "-m", "triton_sp.kernels.hopper.check"], 60, gluon=True),
        Step("single rank", _sweep("single_rank", "cpu", 30), 120),
    ]


def run(step: Step, seconds: float) -> str:
    """The status of a step. A sweep that has lost its GPU is started again, in a new process, where it stopped."""
    # The repository is found without being installed; the kernels' own choice of device must not be overridden.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(machine.ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    # The portable kernels are proven and timed as such, whatever an earlier run has recorded of the Gluon tier.
    environment |= {"TRITON_SP_GLUON": "1" if step.gluon else "0", **step.environment}
    if step.name.startswith("kernels"):
        del environment["TRITON_SP_GLUON"]  # this sweep measures both
    end = time.monotonic() + seconds
    for _ in range(3):
        left = max(end - time.monotonic(), 1.0)
        try:
            code = subprocess.run(step.command, cwd=machine.ROOT, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return "out of time"
        if code != LOST or step.test:
            break
    return {0: "ok", 5: "no tests"}.get(code, f"error: exit code {code}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("perf.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for all steps; default 540")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="with --device cpu: the steps in small")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a GPU that PyTorch can see; there is none here")
        return 2
    if (parsed.device == "cpu") != parsed.quick:
        parser.error("--device cpu and --quick go together: a rehearsal")
    settings = Settings(torch.device(parsed.device), parsed.quick, fresh=True, budget=parsed.budget)
    report, failed = settings.report("steps"), False
    for step in rehearsal() if parsed.quick else steps():
        left = parsed.budget - (time.monotonic() - settings.began) - 2.0
        begin = time.monotonic()
        print(f"--- {step.name}", flush=True)
        status = run(step, min(step.seconds, left)) if left > 5 else "no time left"
        _note(report, step, status, time.monotonic() - begin, settings)
        failed |= step.test and status.startswith("error")
    print(f"--- {report.path.parent}")
    return int(failed)


def _note(report: Report, step: Step, status: str, seconds: float, settings: Settings) -> None:
    row = Row("step", "make gpu", step.name, "", status=status, clock="wall", median_ms=1e3 * seconds)
    row.device = settings.device.type
    if step.gluon and settings.device.type == "cuda":
        from triton_sp.kernels.hopper import gate

        gate.known.cache_clear()  # the step, a process of its own, may just have recorded another verdict
        row.note = gate.known(torch.cuda.current_device()).reason
    report.add([row])
    print(f"--- {step.name}: {status}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
