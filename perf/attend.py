"""Speed of varlen attention beside its peers, on the GPU at hand: perf/results/<gpu>/attend.csv.

TFLOP/s count the products that attention needs, at the true head dim: 4 T T_k D H forward and 10 backward, halved if
causal. Peers run in the same process on the same inputs, in turns; the number is the median of the turns.

    python perf/attend.py [seconds it may take]
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import Report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from triton_sp.ops import varlen_attention

TURNS = 20


class Shape(NamedTuple):
    """A workload: segments of equal length, so that dense peers can run it as a batch."""

    name: str
    segments: int
    length: int
    heads: int
    k_heads: int
    dim: int
    causal: bool = False


SHAPES = [
    Shape("vit 72", 4, 4096, 16, 16, 72),
    Shape("vit 80", 4, 4096, 16, 16, 80),
    Shape("vit 64", 4, 4096, 16, 16, 64),
    Shape("llm 128 causal gqa", 1, 16384, 28, 4, 128, causal=True),
    Shape("llm 128", 1, 16384, 16, 16, 128),
    Shape("windows of 64, 80", 1024, 64, 16, 16, 80),
    Shape("vit 96", 4, 4096, 16, 16, 96),
    Shape("vit 72, one image", 1, 16384, 16, 16, 72),
    Shape("llm 256 causal gqa", 1, 8192, 16, 8, 256, causal=True),
    Shape("frames of 256, 72", 64, 256, 16, 16, 72),
]


def peers(shape: Shape, table: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Functions of packed q, k, v by name."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, table, causal=shape.causal)

    def dense(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(shape.segments, shape.length, -1, shape.dim).transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.k_heads
                )
            return out.transpose(1, 2).flatten(0, 1)

        return run

    found = {
        "triton_sp": ours,
        "sdpa flash": dense(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": dense(SDPBackend.CUDNN_ATTENTION),
    }
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return found
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0 if shape.causal else -1)} if "window_size" in known else {"is_causal": shape.causal}
    )
    if shape.heads != shape.k_heads and "enable_gqa" in known:
        options["enable_gqa"] = True
    return found | {
        "torch varlen": lambda q, k, v: varlen_attn(q, k, v, table, table, shape.length, shape.length, **options)
    }


def milliseconds(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(shape: Shape, report: Report) -> None:
    """Forward and backward of every peer that can run the shape; what one cannot do is a row too."""
    torch.manual_seed(0)
    tokens = shape.segments * shape.length
    table = torch.arange(0, tokens + 1, shape.length, device="cuda", dtype=torch.int32)
    q, k, v, dout = (
        torch.randn(tokens, heads, shape.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (shape.heads, shape.k_heads, shape.k_heads, shape.heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    work = 4e-9 * tokens * shape.length * shape.dim * shape.heads / (2 if shape.causal else 1)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, attend in peers(shape, table).items():
        try:
            out = attend(q, k, v)
            torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        except Exception as error:  # a peer may refuse a shape in any way it likes
            report.add(**shape._asdict(), peer=name, direction="both", error=repr(error)[:200].replace("\n", " "))
            continue
        runs[name, "forward"] = lambda attend=attend: attend(q.detach(), k.detach(), v.detach())
        runs[name, "backward"] = lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(TURNS + 3):
        for key, run in runs.items():
            taken = milliseconds(run)
            if turn >= 3:  # the first turns warm up
                times[key].append(taken)
    for (name, direction), taken in times.items():
        median = statistics.median(taken)
        rate = work * (2.5 if direction == "backward" else 1) / median
        report.add(
            **shape._asdict(), peer=name, direction=direction, ms=round(median, 4), ms_min=round(min(taken), 4),
            ms_max=round(max(taken), 4), tflops=round(rate, 1),
        )  # fmt: skip


def main(seconds: float = 200.0) -> None:
    stop = time.monotonic() + seconds
    report = Report("attend", [*Shape._fields, "peer", "direction", "error", "ms", "ms_min", "ms_max", "tflops"])
    for shape in SHAPES:
        if time.monotonic() > stop:
            print(f"out of time before {shape.name}", flush=True)
            break
        measure(shape, report)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
