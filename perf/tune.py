"""Try other launches than the table's on the GPU at hand, and write the fastest: opt-in autotuning.

    python -m perf.tune tuned.json 72 80 128
    TRITON_SP_TUNED=tuned.json torchrun ...

A file rather than tuning at run time, so that every rank makes the same choice.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from perf.clock import Clock
from triton_sp.kernels import attend, attend_backward, launch
from triton_sp.kernels.mask import Mask

TILES = {
    "forward": [(128, 64), (128, 128), (64, 64), (128, 32)],
    "dq": [(128, 64), (64, 64), (128, 32)],
    "dkv": [(32, 128), (64, 128), (64, 64), (16, 128)],
}
WARPS, STAGES, REGISTERS = (4, 8), (1, 2, 3), (None, 128)


def work(dim: int, heads: int = 16, length: int = 4096) -> dict[str, Callable[[], Any]]:
    """What to time for each kernel. Both kernels of the backward run, of which one changes at a time."""
    q, k, v, dout = torch.randn(4, 2 * length, heads, dim, device="cuda", dtype=torch.bfloat16)
    table = torch.tensor([0, length, 2 * length], device="cuda", dtype=torch.int32)
    mask, scale = Mask(table), dim**-0.5
    out, lse = attend.forward(q, k, v, mask, softmax_scale=scale)

    def backward() -> None:
        attend_backward.backward(dout, None, q, k, v, out, lse, mask, softmax_scale=scale)

    return {
        "forward": lambda: attend.forward(q, k, v, mask, softmax_scale=scale),
        "dq": backward,
        "dkv": backward,
    }


def fastest(kernel: str, dim: int, run: Callable[[], Any], found: dict[str, list[Any]]) -> None:
    """Put the fastest launch into `found`, which is also what the launchers read while this runs."""
    clock = Clock(torch.device("cuda"))
    name, times = f"{launch.target()} {kernel} {dim}", {}
    for (rows, keys), warps, stages, registers in itertools.product(TILES[kernel], WARPS, STAGES, REGISTERS):
        options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
        found[name] = [rows, keys, options]
        try:
            run()
            times[json.dumps(found[name])] = statistics.median(clock.milliseconds(run) for _ in range(15))
        except Exception as error:  # too much shared memory, or a tile the compiler cannot do
            print(f"{name} {found[name]}: {error!r:.80}", flush=True)
    best = min(times, key=times.__getitem__)
    found[name] = json.loads(best)
    print(f"{name}: {best} {times[best]:.3f} ms", flush=True)


def main(path: str, *dims: str) -> None:
    found = launch.tuned()
    for dim in map(int, dims or launch.SPLITS):
        for kernel, run in work(dim).items():
            fastest(kernel, dim, run, found)
    with open(path, "w") as file:
        json.dump(found, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
