"""What a matrix product with 16 columns costs beside one with 32: rows of kernels.csv.

Head dims 72 and 80 are computed as 64 + 16, and whether the 16-wide part runs at its fair share of the matrix units
decides up to 20 % there. Each program multiplies tiles that never leave the SM, with p in registers as in attention.
"""

import argparse

import torch
import triton
import triton.language as tl

from perf.clock import Clock
from perf.contest import Entry, Settings, measure_rates, timed
from perf.rows import Row

STEPS = 4096  # without a GPU: 2, and one program


@triton.jit
def narrow_products(x_ptr, out_ptr, steps, BM: tl.constexpr, BK: tl.constexpr, N: tl.constexpr):
    rows, depth, cols = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, N)
    q = tl.load(x_ptr + rows[:, None] * 64 + tl.arange(0, 64)[None, :])
    k = tl.load(x_ptr + depth[:, None] * 64 + tl.arange(0, 64)[None, :])
    v = tl.load(x_ptr + depth[:, None] * N + cols[None, :])
    p = tl.dot(q, tl.trans(k)).to(q.dtype)
    acc = tl.zeros([BM, N], tl.float32)
    for _ in range(steps):
        acc = tl.dot(p, v, acc)
    tl.store(out_ptr + tl.program_id(0) * BM * N + rows[:, None] * N + cols[None, :], acc)


def main() -> None:
    """Entry point; on a CPU, in Triton's interpreter, it is only tried out."""
    parser = argparse.ArgumentParser("perf.narrow_products", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type == "cuda"
    settings = Settings(device, quick=not on_gpu)
    report, clock = settings.report("kernels"), Clock(settings.device)
    rates, _ = measure_rates(clock, settings)
    programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 1
    steps = STEPS if on_gpu else 2
    x = torch.randn(128 * 256, device=device, dtype=settings.dtype) * 0.01
    entries = []
    for columns in (16, 32, 64, 128):
        out = torch.empty(programs * 128 * columns, device=device)

        def run(out: torch.Tensor = out, columns: int = columns) -> None:
            narrow_products[(programs,)](x, out, steps, BM=128, BK=64, N=columns, num_warps=8)

        work = 2 * programs * steps * 128 * 64 * columns
        row = Row("rate", "triton", f"products of {columns} columns", flops=work, **settings.columns())
        entries.append(Entry(row, run))
    report.add(timed(entries, clock, rates, settings))


if __name__ == "__main__":
    main()
