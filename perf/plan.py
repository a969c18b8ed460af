"""What it costs the host to plan a batch of a million tokens, which each rank does by itself before its first layer.

`lay out` is the stream of a packed batch, from its documents, `lay out again` that of one like it; `choose` the plan,
shards at the ends of documents included, and `choose again` that of a layout that was there before; `route` the
exchange of a layer whose heads do not divide; `agree` what is compared with the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import transformers as hf
from tqdm import tqdm

import triton_sp
from perf.clock import Clock, statistics
from perf.contest import Settings
from perf.rows import Row
from perf.single_rank import alone_among
from triton_sp.loss import shift
from triton_sp.plan.cost import LINKS, Layers, PlanChoice, choose_plan
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import resolve_group
from triton_sp.wrappers.inputs import described
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.kept import lay_out_again
from triton_sp.wrappers.inputs.layout import TextCall, lay_out
from triton_sp.wrappers.install import Layouts, installation_of

LAYERS = Layers(36, 4096, 4096, 1024, 128, 2, causal=True)  # Qwen3-VL-8B's decoder
HEADS, KV_HEADS = 28, 4  # of Qwen2.5-VL-7B, which neither 8 nor 1024 ranks divide


def batch_of(tokens: int, documents: int) -> Batch:
    """A row of labelled documents."""
    ids = torch.randint(0, 9, (1, tokens))
    begins = torch.zeros(1, tokens, dtype=torch.bool)
    begins[0, torch.linspace(0, tokens - 1, documents + 1).long()[:-1]] = True
    return Batch(ids, None, begins, None, None, ids, shift(ids), None)


def parts(batch: Batch, ranks: int) -> dict[str, Callable[[], Any]]:
    """What is timed, on the first of so many ranks."""
    group, found = resolve_group(), list[Segments]()
    even = shard_tokens(batch.tokens.shape[1], ranks)

    def planned(segments: Segments) -> PlanChoice:
        found[:] = [segments]
        return PlanChoice("heads", even, "", {})

    call = lay_out(batch, None, group, planned)
    (segments,) = found

    def choose() -> PlanChoice:
        again = Segments(segments.starts)  # without what an earlier call has worked out
        return choose_plan.__wrapped__(again, ranks, 1, LAYERS, LINKS["nvlink"], "auto", False)

    def choose_again() -> PlanChoice:
        return choose_plan(Segments(segments.starts), ranks, 1, LAYERS, LINKS["nvlink"], "auto", False)

    def route() -> Any:
        stream = Stream(group, even, call.stream.cu_seqlens, None, segments)
        way: Any = stream.route(HEADS, KV_HEADS, True, None)
        return way.inputs, way.arrivals, way.outputs, way.outcomes

    kept = Layouts()

    def lay_out_like() -> TextCall:
        return lay_out_again(kept, "as ever", batch, None, group, planned)

    lay_out_like()
    return {
        "lay out": lambda: lay_out(batch, None, group, planned),
        "lay out again": lay_out_like,
        "choose": choose,
        "choose again": choose_again,
        "route": route,
        "agree": agreeing(batch, f"heads {even.sizes} {segments}"),
    }


def agreeing(batch: Batch, plan: str) -> Callable[[], None]:
    """The comparison with the other ranks, who are stood in for by this one."""
    tiny = hf.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )  # fmt: skip
    installation: Any = installation_of(triton_sp.wrap(hf.LlamaForCausalLM(tiny)))
    arguments = {"input_ids": batch.tokens, "labels": batch.labels}

    def run() -> None:
        with mock.patch.object(collectives, "_of_all", lambda own, group: own.repeat(group.size, 1)):
            described.prepare_on_all(installation, arguments, lambda: None, lambda _: plan)

    return run


def sweep(settings: Settings) -> int:
    """Measure what is not in plan.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("plan: it measures the host; run it with --device cpu")
        return 2
    report, clock = settings.report("plan"), Clock(settings.device)
    tokens = 1 << 12 if settings.quick else 1 << 20
    counts = (1, 16) if settings.quick else (1, 10_000, 100_000)
    for ranks, documents in tqdm([(p, n) for p in (8, 1024) for n in counts], desc="plan", disable=None):
        base = Row(
            "plan", "", f"{documents:,} documents", tokens=tokens, segments=documents, longest=tokens // documents,
            heads=HEADS, kv_heads=KV_HEADS, dim=128, causal=True, ranks=ranks, clock=clock.name, device="cpu",
        )  # fmt: skip
        if settings.over or report.status(replace(base, provider="agree")) is not None:
            continue
        batch = batch_of(tokens, documents)
        with alone_among(ranks, 0):
            times = clock.turns(parts(batch, ranks), 3 if settings.quick else 15, settings.case_seconds)
        report.add(replace(base, provider=name, **statistics(taken)) for name, taken in times.items())
    print(report.path)
    return 0
