"""Whole models on 1, 2 and 4 CPU ranks: what one process, this library and DeepSpeed send, save, compute and take.

Ranks are processes on this machine that talk over gloo, one thread each; all run the same weights on the same batch.
Bytes, FLOPs and collectives are exact. Times are each rank's own CPU time, which other programs change little, and wall
time beside it; they say nothing about GPUs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import triton_sp
from perf import clock
from perf.contest import Settings, failure
from perf.counting import counted, listed
from perf.engines import BUILDERS, ENGINES, LAYERS, ONE, OURS, QUICK, Engine, Size, plain, tokens_of
from perf.rows import Report, Row
from triton_sp.testing import RankError, RankPool, relative_error, saved_activations

CORRECT = 1e-4  # relative, of gradients in float32
RANKS = (1, 2, 4)
# Steps of some milliseconds, of which a fixed cost would be much, and of some hundred; and how many.
OVERHEAD = ((Size(2, 8), 150), (Size(24, 512), 40))


def measure(engine: str, name: str, size: Size, repeats: int, expected: Path) -> dict[str, dict[str, Any]]:
    """This rank's rows: direction -> columns. The one process writes what it found to `expected`, others compare."""
    runner = ENGINES[engine].prepare(name, size)
    model = runner.model
    with runner.around():
        with counted(model) as forward, saved_activations(model) as saved:
            loss = runner.forward()
        with counted(model) as backward:
            loss.backward()
        runner.combine(model)
        total = loss.detach().clone()
        if runner.shared:
            dist.all_reduce(total)
        # One vector of all gradients, under the names of the plain model; zeros where there is none.
        gradient = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for _, p in sorted((n.replace(".attn.", "."), p) for n, p in model.named_parameters())
            ]
        )
        if engine == ONE:
            torch.save((total, gradient), expected)
        wanted = torch.load(expected)
        errors = [relative_error(found, right) for found, right in zip((total, gradient), wanted, strict=True)]
        # All ranks have the same errors. The time of what is wrong is compared with nothing.
        busy, wall = _step_times(model, runner.forward, repeats if max(errors) < CORRECT else 1)
    status = ["ok" if error < CORRECT else "wrong" for error in (*errors, max(errors))]
    return {
        "forward": {
            "status": status[0], "error": errors[0], "collectives": listed(forward.collectives),
            "layer_collectives": listed(forward.inside, LAYERS), "sent_bytes": forward.sent, "flops": forward.flops,
            "saved_bytes": saved[0],
        },
        "backward": {
            "status": status[1], "error": errors[1], "collectives": listed(backward.collectives),
            "sent_bytes": backward.sent,
        },
        "step": {"status": status[2], "clock": "cpu", **clock.statistics(busy)},
        "step, wall time": {"status": status[2], "clock": "wall", **clock.statistics(wall)},
    }  # fmt: skip


def _step_times(model: torch.nn.Module, forward: Callable[[], torch.Tensor], repeats: int) -> tuple[list[float], ...]:
    """CPU and wall milliseconds of forward and backward."""
    busy, wall = [], []
    for _ in range(repeats):
        model.zero_grad()
        dist.barrier()
        starts = time.process_time(), time.perf_counter()
        forward().backward()
        busy.append(1e3 * (time.process_time() - starts[0]))
        wall.append(1e3 * (time.perf_counter() - starts[1]))
    return busy, wall


def overhead(name: str, size: Size, repeats: int) -> dict[str, Any]:
    """What `wrap` costs on one rank: a wrapped model beside the same one as it is, step by step in turns.

    The ratio is the median over the turns of the plain step's CPU time over the wrapped one's.
    """
    forwards: dict[str, Callable[[], torch.Tensor]] = {}
    for kind in ("plain", "wrapped"):
        model, batch = BUILDERS[name](size)
        forwards[kind] = plain(triton_sp.wrap(model) if kind == "wrapped" else model, batch)
    timer = clock.Clock(torch.device("cpu"))
    runs = {kind: lambda forward=forward: forward().backward() for kind, forward in forwards.items()}
    times = timer.turns(runs, repeats, 60.0)
    ratio = statistics.median(a / b for a, b in zip(times["plain"], times["wrapped"], strict=True))
    return {"clock": timer.name, "ratio": ratio, **clock.statistics(times["wrapped"])}


def attempt(pool: RankPool, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any] | str:
    """What the ranks found, or a status: nothing about an engine stops the others."""
    try:
        return pool.run(function, *args, ranks=ranks, timeout=900.0)
    except (RankError, TimeoutError, EOFError) as error:  # EOFError: a rank is gone
        pool.close()
        return failure(next(iter(error.errors.values())) if isinstance(error, RankError) else error)


def _missing(report: Report, row: Row, ranks: int) -> bool:
    return any(report.status(replace(row, ranks=ranks, rank=rank)) is None for rank in range(ranks))


def _run(pool: RankPool, engine: Engine, base: Row, ranks: int, settings: Settings, expected: Path) -> list[Row]:
    """The rows of one engine, model and number of ranks."""
    size, repeats = (QUICK, 2) if settings.quick else (Size(), 9)
    found = attempt(pool, ranks, measure, engine.name, base.case, size, repeats, expected)
    if isinstance(found, str):
        return [replace(base, rank=rank, status=found) for rank in range(ranks)]
    return [
        replace(base, rank=rank, direction=direction, **columns)
        for rank, directions in enumerate(found)
        for direction, columns in directions.items()
    ]


def sweep(settings: Settings) -> int:
    """Measure what is not in model.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("model: its ranks are CPU processes; run it with --device cpu")
        return 2
    report, size = settings.report("model"), QUICK if settings.quick else Size()
    jobs = [
        (ranks, name, engine)
        for ranks in RANKS
        for name in BUILDERS
        for engine in ENGINES.values()
        if (ranks == 1) == (engine.name == ONE) and name in engine.models and not engine.absent
    ]
    with tempfile.TemporaryDirectory() as place, tqdm(jobs, desc="model", disable=None) as progress:
        pool, width = RankPool(), 0
        for ranks, name, engine in progress:
            tokens = tokens_of(name, size)
            shape = {"tokens": tokens, "longest": tokens, "layers": LAYERS, "ranks": ranks}
            base = Row("model", engine.name, name, **shape, **settings.columns())
            expected = Path(place) / name
            if settings.over or (not _missing(report, base, ranks) and (ranks > 1 or not _open(report, base, jobs))):
                continue
            if ranks != width:  # DeepSpeed leaves its groups in globals: new processes for each size
                pool.close()
                width = ranks
            report.add(_run(pool, engine, base, ranks, settings, expected))
        for name in BUILDERS:
            for small, repeats in ((QUICK, 3),) if settings.quick else OVERHEAD:
                tokens = tokens_of(name, small)
                shape = {"tokens": tokens, "longest": tokens, "layers": LAYERS}
                row = Row("model", OURS, name, "step", **shape, **settings.columns())
                if not settings.over and report.status(row) is None:
                    found = attempt(pool, 1, overhead, name, small, repeats)
                    columns = {"status": found} if isinstance(found, str) else found[0]
                    report.add([replace(row, note="beside the same model as it is", **columns)])
        pool.close()
    print(report.path)
    return 0


def _open(report: Report, base: Row, jobs: list[tuple[int, str, Engine]]) -> bool:
    """Whether some engine has yet to be compared with this model on one process, whose results are in no file."""
    return any(
        _missing(report, replace(base, provider=engine.name), ranks)
        for ranks, name, engine in jobs
        if name == base.case and ranks > 1
    )
