"""Measure what is to be known of a machine: latency and bandwidth of the exchange and speed of matrix products, for the
cost model; and which implementation of attention is the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from triton_sp.ops.backends import measure, verdict
from triton_sp.plan.cost import Link
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group

ROUNDS = 20  # the median of these is taken
# The part of the speed of large matrix products that training a transformer reaches; an estimate.
EFFICIENCY = 0.5


def seconds(run: Callable[[], object], group: Group, device: torch.device) -> float:
    """The median time of a call on the slowest rank; every rank gets the same number."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - start

    for _ in range(3):  # to make connections and allocate memory
        once()
    return collectives.largest(statistics.median(once() for _ in range(ROUNDS)), group, device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_link(group: Group, device: torch.device, large: int | None = None) -> Link:
    """Measure the link between the ranks of a group. All of its ranks must call this.

    Args:
        device: where to measure.
        large: how many numbers each rank is sent in the exchange that measures bandwidth; one is sent for latency.
            As a rule 4 MiB on CPUs and 32 MiB on GPUs, whose links are filled by no less.
    """
    large = large or (1 << 20 if device.type == "cpu" else 1 << 23)

    def exchange(count: int) -> Callable[[], Tensor]:
        x = torch.zeros(count * group.size, device=device)
        sizes = [count] * group.size
        return lambda: collectives.exchange(x, sizes, sizes, group)

    latency = seconds(exchange(1), group, device)
    moved = 4 * large * (group.size - 1)
    bandwidth = moved / max(seconds(exchange(large), group, device) - latency, 1e-9)
    side, dtype = (512, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a = torch.zeros(side, side, device=device, dtype=dtype)
    compute = EFFICIENCY * 2 * side**3 / seconds(lambda: a @ a, group, device)
    return Link(f"calibrated {device.type}", latency, bandwidth, compute)


def compare_attention(device: torch.device) -> tuple[list[verdict.Finding], Path]:
    """Compare what can be chosen by `SPConfig.attention` with ours, and keep the result for "auto": on one rank of a
    machine, by itself. Returns what was found, and the file."""
    findings = list(measure.findings(device))
    return findings, verdict.store(device.type, findings)
