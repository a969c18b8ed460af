"""Time of things that are measured side by side: in turns, so that a clock that drifts drifts for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WARM_UP = 2
Run = Callable[[], Any]


class Clock:
    """Milliseconds of a call on a device: by events around it on a GPU, with the L2 cache swept before; by the CPU time
    of this process on a CPU, which what else runs on the machine changes least."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, "cuda events" if device.type == "cuda" else "cpu"
        # The sweep also lets the host run ahead, so that launching is not what is timed.
        self.cache = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def milliseconds(self, run: Run) -> float:
        if self.cache is None:
            begin = time.process_time_ns()
            run()
            return (time.process_time_ns() - begin) / 1e6
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cache.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def turns(self, runs: Mapping[str, Run], repeats: int, seconds: float) -> dict[str, list[float]]:
        """Each run in turn, `repeats` times or until the time is over, but at least 3 times."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + seconds
        for turn in range(WARM_UP + repeats):
            for name, run in runs.items():
                times[name].append(self.milliseconds(run))
            if turn >= WARM_UP + 2 and time.monotonic() > end:
                break
        return {name: taken[WARM_UP:] for name, taken in times.items()}


def statistics(times: list[float]) -> dict[str, Any]:
    """The columns of a row.

    >>> statistics([1.0, 2.0, 3.0])
    {'median_ms': 2.0, 'p20_ms': 1.4, 'p80_ms': 2.6, 'repeats': 3}
    """
    low, median, high = np.percentile(times, [20, 50, 80]).round(6).tolist()
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "repeats": len(times)}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """In a list of one, the bytes at the peak of a block beyond those before it; on a CPU the list stays empty."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)
