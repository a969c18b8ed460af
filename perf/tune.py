"""Try other launches than the table's on the GPU at hand, and write the fastest: opt-in autotuning.

    python -m perf.tune --out tuned.json 72 80 128
    TRITON_SP_TUNED=tuned.json torchrun ...

`--few` tries six launches a kernel instead of all, and is a step of `make gpu`. A file rather than tuning at run time,
so that every rank makes the same choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from perf.clock import Clock
from perf.contest import Settings
from triton_sp.kernels import attend, attend_backward, launch
from triton_sp.kernels.mask import Mask

TILES = {
    "forward": [(128, 64), (128, 128), (64, 64), (128, 32)],
    "dq": [(128, 64), (64, 64), (128, 32)],
    "dkv": [(32, 128), (64, 128), (64, 64), (16, 128)],
}
DIMS = (64, 72, 80, 96, 128, 256)
WARPS, STAGES, REGISTERS = (4, 8), (1, 2, 3), (None, 128)
Candidate = tuple[tuple[int, int], int, int, int | None]  # rows and keys, warps, stages, registers a thread
FEW: dict[str, list[Candidate]] = {
    "forward": [
        ((128, 64), 8, 2, None), ((128, 64), 8, 2, 128), ((128, 64), 8, 3, 128), ((128, 128), 8, 2, None),
        ((64, 64), 4, 2, None), ((128, 32), 8, 2, 128),
    ],
    "dq": [
        ((128, 64), 8, 2, None), ((128, 64), 8, 2, 128), ((128, 64), 8, 1, None), ((64, 64), 4, 2, None),
        ((128, 32), 8, 2, None), ((128, 32), 8, 3, None),
    ],
    "dkv": [
        ((32, 128), 8, 2, None), ((32, 128), 8, 3, None), ((64, 128), 8, 1, None), ((64, 128), 8, 2, None),
        ((64, 64), 4, 2, None), ((16, 128), 8, 2, None),
    ],
}  # fmt: skip


def candidates(kernel: str, few: bool) -> list[Candidate]:
    """The launches to try.

    >>> len(candidates("dq", True)), len(candidates("dq", False))
    (6, 36)
    """
    return FEW[kernel] if few else list(itertools.product(TILES[kernel], WARPS, STAGES, REGISTERS))


def work(dim: int, device: torch.device, heads: int = 16, length: int = 4096) -> dict[str, Callable[[], Any]]:
    """What to time for each kernel. Both kernels of the backward run, of which one changes at a time."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = torch.randn(4, 2 * length, heads, dim, device=device, dtype=dtype)
    table = torch.tensor([0, length, 2 * length], device=device, dtype=torch.int32)
    mask, scale = Mask(table), dim**-0.5
    out, lse = attend.forward(q, k, v, mask, softmax_scale=scale)

    def backward() -> None:
        attend_backward.backward(dout, None, q, k, v, out, lse, mask, softmax_scale=scale)

    return {
        "forward": lambda: attend.forward(q, k, v, mask, softmax_scale=scale),
        "dq": backward,
        "dkv": backward,
    }


def fastest(kernel: str, dim: int, run: Callable[[], Any], found: dict[str, list[Any]], settings: Settings) -> None:
    """Put the fastest launch into `found`, which is also what the launchers read while this runs."""
    clock, few = Clock(settings.device), settings.quick
    name, times = f"{launch.target()} {kernel} {dim}", {}
    for (rows, keys), warps, stages, registers in candidates(kernel, few):
        options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
        found[name] = [rows, keys, options]
        try:
            run()
            taken = [clock.milliseconds(run) for _ in range(1 if settings.device.type == "cpu" else 15)]
            times[json.dumps(found[name])] = statistics.median(taken)
            print(f"{name} {found[name]}: {times[json.dumps(found[name])]:.3f} ms", flush=True)
        except Exception as error:  # too much shared memory, or a tile the compiler cannot do
            print(f"{name} {found[name]}: {error!r:.80}", flush=True)
    best = min(times, key=times.__getitem__)
    found[name] = json.loads(best)
    print(f"{name}: {best} {times[best]:.3f} ms", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("perf.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="the file to write; without it, the result is only printed")
    parser.add_argument("--few", action="store_true")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: in Triton's interpreter, in small"
    )
    parser.add_argument("dims", nargs="*", type=int)
    parsed = parser.parse_args()
    settings = Settings(torch.device(parsed.device), quick=parsed.few)
    small = {"heads": 1, "length": 8} if parsed.device == "cpu" else {}
    found = launch.tuned()
    for dim in parsed.dims or DIMS:
        for kernel, run in work(dim, settings.device, **small).items():
            fastest(kernel, dim, run, found, settings)
    print(json.dumps(found, indent=1))
    if parsed.out:
        with open(parsed.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
