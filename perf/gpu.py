"""Everything that needs a GPU, in one command (`make gpu OUT=folder`), well inside 10 minutes: tests, then sweeps.

    python -m perf.gpu [--out FOLDER] [--budget SECONDS]

Needs PyTorch, Triton, pandas and tqdm, and no network; pytest is not needed. The steps (steps.py) come in the order of
what they tell. Each is a process group of its own with a limit, at which the group is killed; a step that fails does
not stop the others. All results are in one folder, of at most 8 files, and on disk as each step ends:

    machine.json      versions, assemblers, driver, whether Triton works at all
    steps.csv         what became of each step, and which of its tests have failed
    tests.csv         every test, by step
    kernels.csv       attend and packs beside their peers      end_to_end.csv  steps of 4 + 4 layers
    single_rank.csv   the time of a whole model, reckoned      profile.json    the longest kernels of a step
    log.txt           everything that was printed, and what was tuned

If the first tests fail, they run again with the newest other ptxas of the machine (or that of TRITON_SP_PTXAS), and if
they pass, so do all later steps. The exit status is 1 if a test or a self-check failed. `--device cpu --quick` is a
rehearsal of every step in small, on Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch

from perf import machine, preflight
from perf.contest import LOST, Settings
from perf.rows import Report, Row, records
from perf.steps import Step, rehearsal, steps

LEAST = 5.0  # seconds: with less left, no step begins


def run(step: Step, seconds: float, log: IO[str], environment: dict[str, str]) -> str:
    """The status of a step. One that has lost its GPU is started again, in a new process, where it stopped."""
    # The repository is found without being installed; the kernels' own choice of device must not be overridden.
    own = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_SP_GLUON")}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    end = time.monotonic() + seconds
    for _ in range(4):
        code = run_group(step.command, max(end - time.monotonic(), 1.0), log, own | environment | step.environment)
        if code is None:
            return "error: out of time"
        if code != LOST:
            break
    return "ok" if code == 0 else f"error: exit code {code}"


def run_group(command: Sequence[str], seconds: float, log: IO[str], environment: dict[str, str]) -> int | None:
    """The exit code of a command, or None if it was stopped. Nothing that it has started outlives it.

    A grandchild that lives on would hold the GPU while the next step is timed.
    """
    process = subprocess.Popen(
        command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5.0)


@dataclass
class Course:
    """One run of all steps: where it writes, what is left of the time, what has failed."""

    settings: Settings
    report: Report
    log: IO[str]
    environment: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    @property
    def left(self) -> float:
        """Seconds."""
        return self.settings.budget - (time.monotonic() - self.settings.began)

    def take(self, step: Step) -> None:
        """Run a step; a failed one that is worth it, again with another assembler."""
        status = self.once(step, step.name)
        if step.again and status.startswith("error") and (other := self.assembler()):
            path, release = other
            changed = {"TRITON_PTXAS_PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": path}
            name = f"{step.name}, ptxas {release}"
            command = [name if word == step.name else word for word in step.command]
            status = self.once(replace(step, command=command, environment=step.environment | changed), name)
            if status == "ok":
                self.environment |= changed
        self.failed |= step.test and status.startswith("error")

    def once(self, step: Step, name: str) -> str:
        """The status of one try, which is also written."""
        begin = time.monotonic()
        self.say(f"--- {name}")
        status = "no time left"
        if self.left > LEAST:
            status = run(step, min(step.seconds, self.left), self.log, self.environment)
        row = Row("step", "make gpu", name, "", status=status, clock="wall", device=self.settings.device.type)
        row.median_ms = 1e3 * (time.monotonic() - begin)
        row.note = "; ".join([*failures(self.report.path.with_name("tests.csv"), name), *self.environment.values()][:8])
        self.report.add([row])
        self.say(f"--- {name}: {status}, {row.median_ms / 1e3:.0f} s{', ' * bool(row.note)}{row.note}")
        return status

    def assembler(self) -> tuple[str, str] | None:
        """The newest ptxas that is newer than the one in use, and its release; or the one that was asked for."""
        asked = os.environ.get("TRITON_SP_PTXAS")
        for path, release in preflight.assemblers().items():
            if path == asked or release > preflight.in_use():
                return path, ".".join(map(str, release))
        return None

    def say(self, line: str) -> None:
        """To the terminal and into the log."""
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()


def failures(path: Path, step: str) -> list[str]:
    """The tests of a step that have failed, or were running when it was stopped."""
    found = [row for row in records(path) if row["provider"] == step and row["status"].startswith("error")]
    return [f"{row['case']}: {row['status']}"[:200] for row in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a test or a self-check failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser("perf.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of all results; default perf/results/<gpu>")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for all steps; default 540")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="with --device cpu: the steps in small")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a GPU that PyTorch can see; there is none here")
        return 2
    if (parsed.device == "cpu") != parsed.quick:
        parser.error("--device cpu and --quick go together: a rehearsal")
    return follow(rehearsal() if parsed.quick else steps(), torch.device(parsed.device), parsed.out, parsed.budget)


def follow(course: Sequence[Step], device: torch.device, out: Path | None, budget: float) -> int:
    """Take the steps one by one; the exit status."""
    if out is not None:
        os.environ["TRITON_SP_RESULTS"] = str(out.resolve())
    settings = Settings(device, device.type == "cpu", fresh=True, budget=budget)
    report = settings.report("steps")
    folder = report.path.parent
    (folder / "tests.csv").unlink(missing_ok=True)  # sweeps go on where they stopped, tests begin anew
    with (folder / "log.txt").open("w") as log:
        taken = Course(settings, report, log)
        for step in course:
            taken.take(step)
        for unfinished in folder.glob("*.partial"):
            unfinished.unlink()  # of a step that was killed while it wrote
        taken.say(f"--- {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return int(taken.failed)


if __name__ == "__main__":
    sys.exit(main())
