"""What an attention layer costs the host: CPU time of one process, with launches and exchanges replaced by stubs.

A GPU is kept waiting where its host needs longer to launch a layer than the GPU to run it, which is where towers are
on many ranks. So the layer runs on CPU tensors of a few tokens, as on a GPU: the same Python, the same operators, and
launches that do nothing. Beside it stands SDPA on the same tensors, what the unwrapped model calls.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from perf.cases import AttentionCase
from perf.clock import statistics
from perf.contest import Settings
from perf.rows import Row
from perf.single_rank import alone_among
from triton_sp import stages
from triton_sp.ops import dispatch, varlen
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import resolve_group

TOKENS = 16  # of a rank: few, so that what PyTorch itself computes on the CPU is no part of the time
ROUNDS = 20  # layers in a measurement
CASES = (
    AttentionCase("Qwen3-VL ViT", (TOKENS,), 16, 16, 72),
    AttentionCase("Qwen2.5-VL-7B LLM", (TOKENS,), 28, 4, 128, causal=True),
    AttentionCase("Qwen3-VL-8B LLM", (TOKENS,), 32, 8, 128, causal=True),
)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def without_launches() -> Iterator[Counter[str]]:
    """The host's side of a GPU: every kernel is launched on a stub, and counted by its name."""
    from triton.runtime.jit import JITFunction

    from triton_sp.kernels import launch

    launched: Counter[str] = Counter()

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        launched[kernel.fn.__name__] += 1

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "target", lambda: "cuda:90"),
        mock.patch.object(dispatch, "portable", lambda device: "triton"),
        mock.patch.object(dispatch, "implementation", lambda device: "triton"),
        mock.patch.object(varlen, "check_values", lambda *_: None),  # values on a GPU are not looked at
        mock.patch.object(collectives, "_issue", lambda x, send, receive, *_: x.new_empty(sum(receive), *x.shape[1:])),
        mock.patch.object(collectives, "_wait", lambda x, group: x),  # on a GPU the device waits
    ):
        yield launched


def sharded(case: AttentionCase, ranks: int, plan: str) -> Layer:
    """The layer of one of so many ranks."""
    total = TOKENS * ranks
    starts = tuple(range(0, total + 1, TOKENS)) if plan == "segments" else (0, total)
    stream = Stream(
        resolve_group(),
        Shards((TOKENS,) * ranks),
        torch.tensor(starts, dtype=torch.int32),
        host_segments=Segments(starts),
        plan=plan,  # type: ignore[arg-type]
    )
    return lambda q, k, v: stages.attention(q, k, v, stream, causal=case.causal)


def unwrapped(case: AttentionCase) -> Layer:
    """What a model calls without triton_sp."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*states, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
        return out[0].transpose(0, 1)

    return attend


def microseconds(layer: Layer, case: AttentionCase, backward: bool) -> float:
    """CPU time of a layer, the mean of a round."""
    heads = (case.heads, case.kv_heads, case.kv_heads)
    states = [torch.randn(TOKENS, h, case.dim, requires_grad=backward) for h in heads]
    gradient = torch.randn(TOKENS, case.heads, case.dim)
    begin = time.process_time_ns()
    for _ in range(ROUNDS):
        out = layer(*states)
        if backward:
            torch.autograd.grad(out, states, gradient)
    return (time.process_time_ns() - begin) / 1e3 / ROUNDS


def measure(case: AttentionCase, ranks: int, plan: str, repeats: int) -> list[tuple[str, str, list[float], str]]:
    """(provider, direction, milliseconds, note), the two providers in turns."""
    taken: dict[tuple[str, str], list[float]] = {}
    launches: dict[str, Counter[str]] = {}
    with alone_among(ranks, 0), without_launches() as launched:
        layers = {"triton_sp": sharded(case, ranks, plan), "SDPA, unwrapped": unwrapped(case)}
        for turn in range(repeats + 2):
            for name, layer in layers.items():
                for direction, backward in (("forward", False), ("forward and backward", True)):
                    launched.clear()
                    spent = microseconds(layer, case, backward) / 1e3
                    launches[name + direction] = Counter({k: n // ROUNDS for k, n in launched.items()})
                    if turn > 1:
                        taken.setdefault((name, direction), []).append(spent)
    return [
        (name, direction, times, ", ".join(f"{n} {k}" for k, n in sorted(launches[name + direction].items())))
        for (name, direction), times in taken.items()
    ]


def sweep(settings: Settings) -> int:
    """Measure what is not in host.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("host: it measures the host; run it with --device cpu")
        return 2
    report, repeats = settings.report("host"), 3 if settings.quick else 30
    jobs = [(case, ranks, plan) for case in CASES for ranks in (1, 2, 8) for plan in ("heads", "segments")]
    for case, ranks, plan in tqdm(jobs, desc="host", disable=None):
        columns = {**case.columns(), **settings.columns(), "case": f"{case.name}, plan {plan}"}
        base = Row("layer", "", clock="cpu", kind="modelled", ranks=ranks, **columns)
        if settings.over or report.status(replace(base, provider="triton_sp")) is not None:
            continue
        report.add(
            replace(base, provider=provider, direction=direction, note=note, **statistics(times))
            for provider, direction, times, note in measure(case, ranks, plan, repeats)
        )
    print(report.path)
    return 0
