"""The Gluon tier on the GPU at hand: its self-check, and its forward beside the portable one, in turns.

perf/results/<gpu>/gluon.csv: the verdict in the first row, then milliseconds and TFLOP/s (as in attend.py). Times are
taken whatever the verdict is; they mean nothing where it is a no. The verdict is recorded for this machine: from then
on `triton_sp` uses the tier, if it has passed.

    python perf/gluon.py [seconds that the times may take]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from attend import SHAPES, TURNS, Shape, milliseconds
from machine import Report

from triton_sp.kernels import gluon_check, gluon_gate


def measure(shape: Shape, report: Report) -> None:
    """Forward of both tiers on the same tensors."""
    from triton_sp.kernels import attend, attend_gluon, launch

    torch.manual_seed(0)
    tokens = shape.segments * shape.length
    table = torch.arange(0, tokens + 1, shape.length, device="cuda", dtype=torch.int32)
    q, k, v = (
        torch.randn(tokens, heads, shape.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (shape.heads, shape.k_heads, shape.k_heads)
    )
    right = 0 if shape.causal else launch.UNLIMITED
    some: dict[str, Any] = {"scale": shape.dim**-0.5, "right": right}
    every = {**some, "softcap": 0.0, "left": launch.UNLIMITED}
    runs = {
        "portable": lambda: attend.forward(q, k, v, table, table, None, **every),
        "gluon": lambda: attend_gluon.forward(q, k, v, table, table, **some),
        "gluon, waiting": lambda: attend_gluon.forward(q, k, v, table, table, wait=True, **some),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 3):
        for name, run in runs.items():
            taken = milliseconds(run)
            if turn >= 3:  # the first turns warm up
                times[name].append(taken)
    work = 4e-9 * tokens * shape.length * shape.dim * shape.heads / (2 if shape.causal else 1)
    for name, taken in times.items():
        median = statistics.median(taken)
        report.add(**shape._asdict(), tier=name, ms=round(median, 4), tflops=round(work / median, 1))


def main(seconds: float = 20.0) -> int:
    report = Report("gluon", [*Shape._fields, "tier", "ms", "tflops", "verdict"])
    found = gluon_check.run(torch.cuda.current_device())
    report.add(tier="gluon" if found.passed else "portable", verdict=found.reason.replace("\n", " "))
    if gluon_gate.obstacle(torch.cuda.current_device()):
        return 0  # nothing of this machine's to check or to time
    stop = time.monotonic() + seconds
    for shape in SHAPES:
        if shape.dim in (64, 72, 80, 128) and time.monotonic() < stop:
            measure(shape, report)
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
