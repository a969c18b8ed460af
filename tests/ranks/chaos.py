"""Training in which a random fault strikes a random rank at a random moment: `make chaos` writes reports/chaos.csv.

After a pause, the run must go on and end with the weights of the undisturbed one. After any other fault each process
must end, with an error that names the struck rank; a restart from the last whole checkpoint must end with the weights
of the undisturbed run, bit for bit; and no process, shared memory or temporary file may be left.

One process imports everything and forks the ranks, as a start of Python takes seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import chaos_train
import torch
import torch.distributed as dist
from chaos_train import ACTIONS, STEPS, Fault

from tools.marked import filled
from triton_sp.errors import SPError

LIMIT = 90.0  # seconds in which all processes of a run must have ended
SHAPES = ((1, 2), (1, 3), (1, 4), (2, 2))  # replicas, and ranks that share a batch
HARMLESS = ("paused", "slow")
ROOT = Path(__file__).parents[2]
KEPT, DOCUMENT = ROOT / "tests" / "data" / "chaos.csv", ROOT / "docs" / "proof.md"
FORK = multiprocessing.get_context("fork")


class Scenario(NamedTuple):
    """A run: engine, shape and fault."""

    seed: int
    engine: str
    replicas: int
    ranks: int
    fault: Fault


def scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    draw = random.Random(seed)
    kind, (replicas, sharing) = list(ACTIONS)[seed % len(ACTIONS)], draw.choice(SHAPES)
    places = ["tower", "forward", "backward", "update"]
    if kind in ("killed", "stopped", "paused", "connections cut"):
        places += ["any"] * 4
    where = "checkpoint" if kind == "disk full" else draw.choice(places)
    step = draw.choice((1, 3, 5)) if kind == "disk full" else draw.randrange(STEPS)
    fault = Fault(kind, draw.randrange(replicas * sharing), step, where, round(draw.uniform(0, 0.3), 3))
    return Scenario(seed, draw.choice(("loop", "ddp", "fsdp")), replicas, replicas * sharing, fault)


@dataclass
class End:
    """How a rank ended: its digest, or its error and what one of ours names; neither if it was ended from outside."""

    digest: str = ""
    kind: str = ""
    text: str = ""
    field: str = ""
    seconds: float = 0.0


def _rank(rank: int, ranks: int, folder: Path, port: Any, arguments: tuple[Any, ...]) -> None:
    """A rank process; it writes its End to a file."""
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    end, start = End(), time.time()
    try:
        while not port.value:
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", port.value, ranks, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=40))
        end.digest = chaos_train.train(folder / "checkpoints", *arguments)
    except BaseException as error:
        traceback.print_exc()
        end.kind, end.text = type(error).__name__, str(error)
        end.field = error.field if isinstance(error, SPError) else ""
    struck = folder / "checkpoints" / "struck"
    end.seconds = time.time() - (struck.stat().st_mtime if struck.exists() else start)
    (folder / f"end{rank}").write_text(json.dumps(vars(end)))
    if end.digest:
        dist.destroy_process_group()
    sys.stdout.flush()


def _launch(ranks: int, folder: Path, arguments: tuple[Any, ...], port: Any) -> None:
    """A launcher: it keeps the store, as torchrun does, and ends a rank that has stopped when all others are gone."""
    os.setsid()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    children = [FORK.Process(target=_rank, args=(rank, ranks, folder, port, arguments)) for rank in range(ranks)]
    for child in children:
        child.start()  # before the store has threads: one that holds a lock now would hold it in the child for ever
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.value = store.port
    end, fault = time.monotonic() + LIMIT, arguments[2]
    while time.monotonic() < end and any(child.is_alive() for child in children):
        alive = [rank for rank, child in enumerate(children) if child.is_alive()]
        for_good = fault is not None and fault.kind == "stopped"
        if for_good and alive == [fault.rank] and _is_stopped(children[fault.rank].pid):
            children[fault.rank].kill()
        time.sleep(0.05)
    (folder / "hang").write_text(" ".join(str(rank) for rank, child in enumerate(children) if child.is_alive()))
    for child in children:
        child.kill()
        child.join()


def _is_stopped(process: int | None) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def run(folder: Path, ranks: int, engine: str, replicas: int, fault: Fault | None) -> list[End]:
    """How each rank ended."""
    for name in ("tmp", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for old in folder.glob("end*"):
        old.unlink()
    launcher = FORK.Process(target=_launch, args=(ranks, folder, (engine, replicas, fault), FORK.Value("i", 0)))
    launcher.start()
    launcher.join()
    ends = []
    for rank in range(ranks):
        file = folder / f"end{rank}"
        ends.append(End(**json.loads(file.read_text())) if file.exists() else End())
    if hung := (folder / "hang").read_text():
        for rank in map(int, hung.split()):
            ends[rank] = End(kind="hang")
    left = _processes_of(launcher.pid)
    for process in left:
        os.kill(process, signal.SIGKILL)
    if left:
        ends[0] = End(kind="processes left")
    return ends


def _processes_of(session: int | None) -> list[int]:
    """The processes that a launcher has left behind; those that wake a paused one end by themselves."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and os.getsid(int(place.name)) == session:
                ended = (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not ended and b"sleep" not in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
        except OSError:
            continue
    return found


def _memory() -> set[str]:
    """All shared memory. Semaphores of Python are other programs': one that is forked, as here, has no name."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def _is_mapped(name: str) -> bool:
    """Whether a process uses a piece of shared memory, as other programs of this machine may."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}" in maps.read_text():
                return True
        except OSError:
            continue
    return not (Path("/dev/shm") / name).exists()


_undisturbed: dict[tuple[str, int, int], list[str]] = {}


def undisturbed(engine: str, replicas: int, ranks: int, folder: Path) -> list[str]:
    """The digests of a run without a fault."""
    key = (engine, replicas, ranks)
    if key not in _undisturbed:
        place = folder / f"undisturbed-{engine}-{replicas}-{ranks}"
        ends = run(place, ranks, engine, replicas, None)
        if not all(end.digest for end in ends):
            raise RuntimeError(f"{key} fails without a fault: {ends}")
        _undisturbed[key] = [end.digest for end in ends]
    return _undisturbed[key]


def survivors(case: Scenario, others: list[End], wanted: list[str]) -> tuple[int, int, list[str]]:
    """How many of those that the fault did not strike name the rank, of how many with an error, and what is wrong."""
    wrong, failed = [], [end for end in others if not end.digest]  # none has, if nothing was left to do together
    if failed and len(failed) < len(others):
        wrong.append("some ended as if nothing had happened")
    if not {end.digest for end in others} <= {"", *wanted}:
        wrong.append("went on with other weights")
    names = {str(rank) for rank in (case.fault.rank, case.fault.rank % (case.ranks // case.replicas))}
    told = [set(re.findall(r"\d+", end.field if end.field.startswith("rank") else "")) for end in failed]
    if any(ranks and not ranks & names for ranks in told):  # "ranks 0, 2" may be all that gave no sign of life
        wrong.append("another rank is blamed")
    named = sum(len(ranks) == 1 and ranks <= names for ranks in told)
    if case.engine == "loop" and named < len(failed):  # elsewhere the error may be the engine's
        wrong.append("the rank is not named")
    return named, len(failed), wrong


def judge(case: Scenario, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    fault, wanted = case.fault, undisturbed(case.engine, case.replicas, case.ranks, folder)
    place = folder / f"{case.seed}"
    memory = _memory()
    ends = run(place, case.ranks, case.engine, case.replicas, fault)
    wrong, named, told = [], 0, 0
    struck = (place / "checkpoints" / "struck").exists()
    others = [end for rank, end in enumerate(ends) if rank != fault.rank]
    if any(end.kind in ("hang", "processes left") for end in ends):
        wrong.append(next(end.kind for end in ends if end.kind in ("hang", "processes left")))
    if fault.kind in HARMLESS or not struck or all(end.digest for end in ends):
        if [end.digest for end in ends] != wanted:
            wrong.append("not the weights of the undisturbed run")
        if struck and fault.kind not in (*HARMLESS, "connections cut", "stopped", "killed"):
            wrong.append("went on after a fault")
    else:
        named, told, bad = survivors(case, others, wanted)
        wrong += bad
        again = run(place, case.ranks, case.engine, case.replicas, None)
        if [end.digest for end in again] != wanted:
            wrong.append(f"restart: {next((e.text or e.kind for e in again if not e.digest), 'other weights')}")
    if any(not _is_mapped(name) for name in _memory() - memory):
        wrong.append("shared memory left")
    if list((place / "tmp").iterdir()) or (fault.kind not in ("killed", "stopped") and list(place.rglob("*.part"))):
        wrong.append("files left")
    row = {"seed": case.seed, "engine": case.engine, "replicas": case.replicas, "ranks": case.ranks, **fault._asdict()}
    row["struck"] = struck
    row["errors"] = " ".join(sorted({end.kind for end in others if end.kind}))
    row["named by"] = f"{named} of {told}"
    row["seconds"] = round(max((end.seconds for end in others), default=0), 1)
    row["message"] = next((end.text.splitlines()[0] for end in others if end.text), "")[:300]
    row["wrong"] = "; ".join(wrong)
    if not wrong:
        shutil.rmtree(place)
    return row


def table(rows: list[dict[str, str]]) -> list[str]:
    """Of each kind of fault: how many runs came out as they should, and how many survivors were told the rank, in a
    plain loop and with an engine, and after how many seconds at most."""
    lines = [
        "| fault | runs | as it should | named, loop | named, DDP and FSDP2 | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ACTIONS:
        own = [row for row in rows if row["kind"] == kind and row["struck"] == "True"]
        right = sum(not row["wrong"] for row in own)
        named = []
        for loop in (True, False):
            told = [row["named by"].split(" of ") for row in own if (row["engine"] == "loop") == loop]
            named.append(f"{sum(int(a) for a, _ in told)} of {sum(int(b) for _, b in told)}")
        if kind in HARMLESS:
            named = ["", ""]
        slowest = max((float(row["seconds"]) for row in own), default=0)
        lines.append(f"| {kind} | {len(own)} | {right} | {named[0]} | {named[1]} | {slowest:g} |")
    return lines


def kept(file: Path = KEPT) -> list[dict[str, Any]]:
    """The runs of a table."""
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write(file: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Write a table by the seeds, with some of its columns."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["seed"])))


def written(text: str) -> str:
    """A document with the table of the runs that are kept."""
    return filled(text, "chaos", table(kept()))


def main() -> int:
    """Run the scenarios of some seeds; 0 if every one came out as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", action="store_true", help="put the report into tests/data and docs/proof.md")
    arguments = parser.parse_args()
    report = ROOT / "reports" / "chaos.csv"
    report.parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    bad = 0
    for seed in range(arguments.first, arguments.first + arguments.runs):
        row = judge(scenario(seed), folder)
        write(report, list(row), [row] + [old for old in kept(report) if old["seed"] != str(seed)])
        bad += bool(row["wrong"])
        print(*row.values(), sep=" | ", flush=True)
    if arguments.keep:
        runs = kept(report)
        write(KEPT, [name for name in runs[0] if name != "message"], runs)
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    if not bad:
        shutil.rmtree(folder)
    else:
        print(f"{bad} came out wrong; what their ranks printed is in {folder}")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
