"""The stages pack and unpack: each byte is read once and written once, so GB/s beside a plain copy is the measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perf.cases import AttentionCase
from perf.clock import Clock
from perf.contest import Entry, Rates, Settings, compete, failure
from perf.rows import Report, Row
from triton_sp.ops import pack
from triton_sp.plan.boxes import route
from triton_sp.plan.heads import assign_heads
from triton_sp.plan.shards import shard_tokens

RANKS = 8
TOKENS = 1 << 17  # of the whole stream: 16k on each rank


@dataclass
class Layer:
    """What rank 0 of `RANKS` holds of a layer: q, k, v of its tokens, and where the boxes of them go."""

    case: AttentionCase
    settings: Settings

    def __post_init__(self) -> None:
        case, settings = self.case, self.settings
        shares = assign_heads(case.heads, case.kv_heads, RANKS, case.segments.work(case.causal))
        self.route = route(shard_tokens(case.tokens, RANKS), shares, 0)
        self.rows = len(shard_tokens(case.tokens, RANKS).range(0))
        heads = (case.heads, case.kv_heads, case.kv_heads)
        new = {"device": settings.device, "dtype": settings.dtype}
        self.states = [torch.randn(self.rows, h, case.dim, **new) for h in heads]
        self.size, self.back = sum(self.route.inputs.sizes), sum(self.route.results.sizes)
        self.arrived = torch.randn(self.back, case.dim, **new)
        self.inputs = pack.box_table(self.route.inputs.boxes, settings.device)
        self.results = pack.box_table(self.route.results.boxes, settings.device)
        self.whole = case.heads % RANKS == case.kv_heads % RANKS == 0

    def by_copies(self) -> Tensor:
        """pack by PyTorch, one copy a tensor, where heads divide."""
        parts = [x.unflatten(1, (RANKS, -1)).transpose(0, 1) for x in self.states]
        out = parts[0].new_empty(RANKS, self.rows, sum(x.shape[2] for x in parts), self.case.dim)
        for x, place in zip(parts, out.split([x.shape[2] for x in parts], 2), strict=True):
            place.copy_(x)
        return out.flatten(0, 2)

    def back_by_copies(self) -> Tensor:
        """unpack by PyTorch, where heads divide."""
        return self.arrived.view(RANKS, self.rows, -1, self.case.dim).transpose(0, 1).flatten(1, 2).contiguous()

    def stages(self) -> dict[str, tuple[int, dict[str, Callable[[], Any]]]]:
        """stage -> (vectors read and written, provider -> what it runs)."""
        found: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
            "pack": (2 * self.size, {"triton_sp": self.pack}),
            "unpack": (2 * self.back, {"triton_sp": self.unpack}),
        }
        if self.whole:
            for stage, run in zip(found, (self.by_copies, self.back_by_copies), strict=True):
                found[stage][1]["torch"] = run
        return found

    def pack(self) -> Tensor:
        if self.whole:
            return pack.pack_heads(self.states, RANKS)
        return pack.pack_boxes(self.states, self.inputs, self.size)

    def unpack(self) -> Tensor:
        out = self.arrived.new_empty(self.rows, self.case.heads, self.case.dim)
        if self.whole:
            pack.unpack_heads(self.arrived, [out], RANKS)
        else:
            pack.unpack_boxes(self.arrived, self.results, [out])
        return out


def _case(settings: Settings, name: str, heads: int, kv_heads: int, dim: int, causal: bool = False) -> AttentionCase:
    tokens = TOKENS if settings.device.type == "cuda" and not settings.quick else 1 << 10
    return AttentionCase(name, (tokens,), heads, kv_heads, dim, causal)


def contests(settings: Settings) -> Iterator[tuple[str, Callable[[Settings, Clock, Rates, Report], None]]]:
    """The layers of four models on rank 0 of 8."""
    for case in (
        _case(settings, "Qwen3-VL ViT, image", 16, 16, 72),
        _case(settings, "Qwen2-VL ViT, image", 16, 16, 80),
        _case(settings, "Qwen3-VL-8B LLM, document", 32, 8, 128, True),
        _case(settings, "Qwen2.5-VL-7B LLM, document", 28, 4, 128, True),  # heads in fractions
    ):
        yield f"pack and unpack of {case.name}", lambda *args, case=case: measure(case, *args)


def measure(case: AttentionCase, settings: Settings, clock: Clock, rates: Rates, report: Report) -> None:
    """Both stages of a layer, each beside PyTorch's copies where heads divide; results must agree bit for bit."""
    layer = Layer(case, settings)
    base = Row("", "", ranks=RANKS, **{**case.columns(), **settings.columns()})
    for stage, (vectors, runs) in layer.stages().items():
        rows = {name: replace(base, stage=stage, provider=name) for name in runs}
        if all(report.status(row) for row in rows.values()):
            continue
        entries, failed, results = [], [], {}
        for name, run in runs.items():
            try:
                results[name] = run()
                entries.append(Entry(rows[name], run, vectors * case.dim * settings.dtype.itemsize))
            except Exception as error:
                failed.append(replace(rows[name], status=failure(error)))
        if len(results) == 2 and not torch.equal(*results.values()):
            for entry in entries:
                entry.row = replace(entry.row, status="wrong", note="triton_sp and torch differ")
        report.add(failed + compete(entries, clock, rates, settings))
