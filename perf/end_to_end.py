"""Whole steps of a few layers of Qwen3-VL-8B on one device, attention computed in turn by each that can, and a profile.

One rank of 8 (single_rank.py: its exchanges are local copies, so rows are modelled) and one process alone. Beside this
library's kernels stands the same wrapped model with other attention (`SPConfig(attention=...)`), and on one process
the model as it is. Rows go to end_to_end.csv; profile.json has the 30 longest kernels of a step, and how long of it no
kernel ran, which is what the host costs.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import triton_sp
from perf import machine
from perf.clock import statistics
from perf.contest import Settings, failure
from perf.rows import Report, Row
from perf.single_rank import SMALL, Run, Shape, alone_among, build, video
from triton_sp.kernels.hopper import gate
from triton_sp.ops.backends.choice import adapters

STEPS = 3
CONFIG = triton_sp.SPConfig(check="off", link="nvlink", chunked_loss=True, single=True)
TOP = 30


@dataclass(frozen=True)
class Contest:
    """One size."""

    shape: Shape
    run: Run
    ranks: int


@dataclass(frozen=True)
class Provider:
    """Who attends: `SPConfig.attention` of a wrapped model, or None for the model as it is; on Hopper with or without
    the Gluon tier."""

    name: str
    attention: str | None = "triton"
    gluon: str = "0"


def providers(contest: Contest, device: torch.device) -> list[Provider]:
    """This library's kernels first, then each of those that can take their place here."""
    found = [Provider("triton_sp")]
    if device.type == "cuda" and gate.known(torch.cuda.current_device()).passed:
        found.append(Provider("triton_sp gluon", gluon="1"))
    found += [Provider(f"attention={name}", name) for name, it in adapters().items() if not it.absent()]
    if contest.ranks == 1:
        found.append(Provider("unwrapped, SDPA", None))
    return found


def contests(settings: Settings) -> list[Contest]:
    """Four layers of each stack: 65,536 visual tokens on 8 ranks, and what one rank of them has on one process."""
    if settings.device.type == "cpu":
        return [Contest(SMALL, Run(1, 1, 8), 2), Contest(SMALL, Run(1, 1, 4), 1)]
    return [Contest(Shape(), Run(4, 4, 256), 8), Contest(Shape(), Run(4, 4, 32), 1)]


def row_of(contest: Contest, provider: str, settings: Settings) -> Row:
    """What a row says of its case; `tokens` are visual ones of the whole stream."""
    shape, run, ranks = contest.shape, contest.run, contest.ranks
    name = f"{'Qwen3-VL-8B' if shape == Shape() else 'small'}, video, {run.vision_layers} + {run.layers} layers"
    tokens = run.frames * shape.frame_tokens
    return Row(
        "model", provider, name, "step", kind="modelled" if ranks > 1 else "measured", device=settings.device.type,
        dtype="bfloat16", ranks=ranks, rank=ranks - 1, layers=run.layers, tokens=tokens, segments=run.frames,
        longest=tokens, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.hidden // shape.heads, causal=True,
        clock="wall",
    )  # fmt: skip


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a step, from an idle device to an idle device."""
    _settle(device)
    begin = time.perf_counter()
    step()
    _settle(device)
    return time.perf_counter() - begin


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The longest kernels of a step (on a CPU: operators), and how long of it none ran."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as trace:
        wall = seconds_of(step, device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = [(event.key, event.count, getattr(event, name) / 1e3) for event in trace.key_averages()]
    times.sort(key=lambda item: -item[2])
    busy = sum(item[2] for item in times)
    return {
        "wall_ms": round(1e3 * wall, 3),
        "busy_ms": round(busy, 3),
        "idle_ms": round(max(1e3 * wall - busy, 0.0), 3),
        "launches": sum(item[1] for item in times if item[2] > 0),
        "longest": [{"name": key[:120], "calls": count, "ms": round(ms, 3)} for key, count, ms in times[:TOP]],
    }


def measure(contest: Contest, settings: Settings, report: Report, profiles: dict[str, Any]) -> None:
    """All providers on one model, which is built once."""
    device = settings.device
    model, batch = build(contest.shape, contest.run, device), video(contest.shape, contest.run.frames, device)
    step, losses = partial(_step, model, batch), list[float]()
    for provider in providers(contest, device):
        row = row_of(contest, provider.name, settings)
        if settings.over or report.status(row) is not None:
            continue
        try:
            with ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, TRITON_SP_GLUON=provider.gluon))
                stack.enter_context(alone_among(contest.ranks, contest.ranks - 1))
                if provider.attention is not None:
                    triton_sp.wrap(model, config=replace(CONFIG, attention=provider.attention))  # type: ignore[arg-type]
                    stack.callback(triton_sp.unwrap, model)
                losses.append(step())  # which also compiles
                times = [1e3 * seconds_of(step, device) for _ in range(STEPS)]
                if device.type == "cuda":
                    row.memory_bytes = torch.cuda.max_memory_allocated()
                ran = "".join(f"; {line.last_batch}" for line in triton_sp.explain(model).rows if provider.attention)
                profiles[f"{provider.name}, P = {contest.ranks}"] = profile(step, device)
        except Exception as error:  # of any provider
            report.add([replace(row, status=failure(error))])
            continue
        # Also of one rank of several: what it gets of the others is the same for every provider.
        row = replace(row, error=abs(losses[-1] / losses[0] - 1.0), **statistics(times))
        row.status = "ok" if row.error is not None and row.error < 0.01 else "wrong"
        row.note = (
            f"{row.tokens / contest.ranks / (row.median_ms or 1.0) * 1e3:.0f} visual tokens a second and rank{ran}"
        )
        report.add([row])
    del model, batch, step
    gc.collect()


def _step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())


def sweep(settings: Settings) -> int:
    """Measure what is not in end_to_end.csv yet; the exit code."""
    report, profiles = settings.report("end_to_end"), dict[str, Any]()
    path = report.path.with_name("profile.json")
    if path.exists():
        profiles = json.loads(path.read_text())
    todo: Sequence[Contest] = contests(settings)
    for contest in tqdm(todo, desc="end_to_end", disable=None):
        measure(contest, settings, report, profiles)
        path.write_text(json.dumps({"machine": machine.describe(), **profiles}, indent=1) + "\n")
    print(report.path)
    return 0
