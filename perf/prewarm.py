"""Compiles the kernels that the next steps need, in as many processes as there are cores, into Triton's cache.

Compiling takes a second or more a kernel and uses one core, so tests and sweeps that compile as they go would spend
most of a GPU's minutes on it. Nothing is run. Without a GPU the kernels are compiled for sm_90.

    python -m perf.prewarm DIM ...
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
JOBS = ("forward", "backward", "ranges", "gluon", "gluon waiting", "gluon backward")


@contextmanager
def compiling() -> Iterator[list[str]]:
    """Within it a launch compiles its kernel and does not run it; the names of the kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    real, names = JITFunction.run, list[str]()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(kernel.__name__)
        return real(kernel, *args, grid=grid, warmup=True, **options)

    class StandIn:
        """As much of a driver as compiling needs."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> str:
            return "sm_90"

        def get_current_stream(self, device: str) -> int:
            return 0

    before = driver._active
    if not torch.cuda.is_available():
        driver.set_active(StandIn())  # type: ignore[arg-type]
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield names
    finally:
        driver._active = before


def compile_one(job: str, dim: int, dtype: str) -> str:
    """What one process does: the kernels of a job, and how long they took."""
    from triton_sp.kernels import attend, attend_backward
    from triton_sp.kernels.hopper import attend as hopper
    from triton_sp.kernels.hopper import backward as hopper_backward
    from triton_sp.kernels.hopper import gate
    from triton_sp.kernels.mask import Mask

    begin, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = torch.zeros(128, 6, dim, dtype=DTYPES[dtype], device=device).split((4, 1, 1), 1)
    table = torch.tensor([0, 100, 128], dtype=torch.int32, device=device)
    ranges = torch.zeros(2, 128, dtype=torch.int32, device=device) if job == "ranges" else None
    mask, scale = Mask(table, key_ranges=ranges, causal=job != "ranges"), dim**-0.5
    if job.startswith("gluon"):
        other = gate.obstacle(0) if torch.cuda.is_available() else gate.missing_api()
        if other or not hopper.takes(q, k, v, mask, 0.0):
            return f"{job} {dim} {dtype}: not for this machine"
    with compiling() as names:
        if job == "gluon backward":
            lse = torch.zeros(4, 128, device=device)
            hopper_backward.backward(q, None, q, k, v, q, lse, mask, softmax_scale=scale)
        elif job.startswith("gluon"):
            hopper.forward(q, k, v, mask, softmax_scale=scale, wait=job == "gluon waiting")
        elif job == "forward":
            attend.forward(q, k, v, mask, softmax_scale=scale)
        else:
            lse = torch.zeros(4, 128, device=device)
            if job == "ranges":
                attend.forward(q, k, v, mask, softmax_scale=scale)
            attend_backward.backward(q, None, q, k, v, q, lse, mask, softmax_scale=scale)
    return f"{job} {dim} {dtype}: {', '.join(names)}, {time.monotonic() - begin:.1f} s"


def main(*dims: str) -> int:
    """Entry point; 1 if something does not compile."""
    jobs = [(job, int(dim), "bf16") for dim in dims for job in JOBS]
    failed = 0
    processes = min(12, os.cpu_count() or 1, len(jobs))
    # spawn: a process that was forked from one that has used CUDA cannot.
    with ProcessPoolExecutor(processes, mp.get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, *job) for job in jobs]:
            try:
                print(done.result(), flush=True)
            except Exception as error:  # whatever a compiler may raise: the tests that need the kernel will say so too
                failed = 1
                print(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
