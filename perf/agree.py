"""What `SPConfig(check=...)` costs: the time between a rank's call of the model and its going on, and what it sends.

Before that ranks wait for one another, so that what is timed is the check and not who is late. In all three settings
the batch is laid out meanwhile, which "off" shows alone. Ranks are processes on this machine that talk over gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

import triton_sp
from perf.clock import WARM_UP, statistics
from perf.contest import Settings
from perf.engines import Size, build_llm
from perf.rows import Row
from triton_sp.ranks import collectives
from triton_sp.testing import RankPool
from triton_sp.wrappers import entry

CHECKS = ("off", "first", "always")
RANKS = (2, 4)
DOCUMENT = 64  # tokens: long batches whose attention is short


def measure(tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """This rank's columns by setting, which take turns."""
    times: dict[str, list[float]] = {check: [] for check in CHECKS}
    sent: dict[str, int] = {}
    models = {}
    for check in CHECKS:
        model, batch = build_llm(Size(0, tokens))
        batch["position_ids"] = torch.arange(tokens)[None] % DOCUMENT
        models[check] = triton_sp.wrap(model, config=triton_sp.SPConfig(check=check))
    prepare: Callable[..., Any] = entry.prepare_on_all
    for _ in range(WARM_UP + repeats):
        for check, model in models.items():

            def timed(*args: Any, check: str = check) -> Any:
                dist.barrier()
                begin = time.perf_counter()
                prepared = prepare(*args)
                times[check].append(1e3 * (time.perf_counter() - begin))
                return prepared

            with mock.patch.object(entry, "prepare_on_all", timed), collectives.record() as ledger, torch.no_grad():
                model(**batch)
            sent[check] = sum(size for name, size in ledger.entries if name == "agree")
    return {check: {"sent_bytes": sent[check], **statistics(taken[WARM_UP:])} for check, taken in times.items()}


def sweep(settings: Settings) -> int:
    """Measure what is not in agree.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("agree: its ranks are CPU processes; run it with --device cpu")
        return 2
    report, pool = settings.report("agree"), RankPool()
    sizes, repeats = ((128,), 3) if settings.quick else ((512, 8192), 15)
    for ranks, tokens in tqdm([(p, n) for p in RANKS for n in sizes], desc="agree", disable=None):
        shape = {"tokens": tokens, "segments": tokens // DOCUMENT, "longest": DOCUMENT, "ranks": ranks}
        rows = [
            Row(
                "agree", f'check="{check}"', "Llama LLM, packed", rank=rank, clock="wall", **shape, **settings.columns()
            )
            for rank in range(ranks)
            for check in CHECKS
        ]
        if settings.over or all(report.status(row) for row in rows):
            continue
        found = pool.run(measure, tokens, repeats, ranks=ranks, timeout=900.0)
        columns = [columns for rank in found for columns in rank.values()]
        report.add(replace(row, **values) for row, values in zip(rows, columns, strict=True))
    pool.close()
    print(report.path)
    return 0
