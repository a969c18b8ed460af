"""Features between ViT and LLM on one rank: what is sent and held, routed and by gather-then-slice.

    python -m perf.sweep fuse        P = 2 and 4 run over gloo, P = 2, 4 and 8 are counted without running

"routed" is `triton_sp.FusionAdapter`: each rank embeds its own tokens and gets the visual features of its own
placeholders. "gathered" is what else is done: every rank gathers all visual features (by the exact adjoint pair of
triton_sp.comm), puts them into all embeddings, and keeps its slice. Both give the same result and gradients.

The batch is one video between text, float32. Bytes of the peak are those of all tensors alive at once that the forward
made, its result and what it keeps for the backward included, parameters and input left out.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perf.contest import Settings
from perf.rows import Row
from triton_sp import FusionAdapter
from triton_sp.plan.shards import Shards, moves, shard_tokens
from triton_sp.ranks import collectives, groups
from triton_sp.testing import RankPool, relative_error

TOKENS, START, VISUAL, WIDTH, PLACEHOLDER, VOCABULARY = 6000, 600, 4500, 256, 7, 64
ROW = 4 * WIDTH  # bytes
WAYS = {"routed": "triton_sp", "gathered": "gather then slice"}


# --- by running ----------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The bytes of all tensors that were made inside and are alive, at their most, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # What an operation returns of its arguments' memory was there before, or is counted already.
            if isinstance(x, Tensor) and x.is_floating_point() and not _is_view(func):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


def _is_view(func: Any) -> bool:
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def batch() -> tuple[Tensor, Tensor]:
    """Ids (1, TOKENS) and all visual features (VISUAL, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((1, TOKENS), 1)
    ids[:, START : START + VISUAL] = PLACEHOLDER
    return ids, torch.randn(VISUAL, WIDTH, generator=generator)


@dataclass(frozen=True)
class Parts:
    projection: nn.Module
    embedding: nn.Module

    @property
    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for m in (self.projection, self.embedding) for p in m.parameters()])


def parts() -> Parts:
    torch.manual_seed(0)
    return Parts(nn.Linear(WIDTH, WIDTH, bias=False), nn.Embedding(VOCABULARY, WIDTH))


def fused(way: str, model: Parts, visual: Tensor, ids: Tensor, group: groups.Group) -> Tensor:
    """(1, T, C), this rank's columns."""
    if way == "routed":
        return FusionAdapter(model.projection, None, image_token_id=PLACEHOLDER)(visual, model.embedding, ids)
    shards, own = shard_tokens(VISUAL, group.size), shard_tokens(TOKENS, group.size).range(group.rank)
    whole = collectives.gather(model.projection(visual), shards.sizes, group)
    text = model.embedding(ids)
    mask = (ids == PLACEHOLDER)[..., None].expand_as(text)
    return text.masked_scatter(mask, whole)[:, own.start : own.stop].contiguous()


def run(way: str) -> dict[str, Any]:
    """This rank's row."""
    group, model, single = groups.resolve_group(), parts(), parts()
    ids, features = batch()
    visual, own = (shard_tokens(total, group.size).range(group.rank) for total in (VISUAL, TOKENS))
    local = features[visual.start : visual.stop].clone()
    text = single.embedding(ids)
    expected = text.masked_scatter((ids == PLACEHOLDER)[..., None].expand_as(text), single.projection(features))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    with collectives.record() as forward, Live() as live:
        out = fused(way, model, local, ids, group)
    with collectives.record() as backward:
        (out * weights[:, own.start : own.stop]).sum().backward()
    total = collectives.all_reduce(model.gradients, group)
    sent = [
        sum(size for name, size in ledger.entries if name in ("exchange", "gather")) for ledger in (forward, backward)
    ]
    return {
        "rank": group.rank,
        "sent_bytes_forward": sent[0],
        "sent_bytes_backward": sent[1],
        "largest_bytes": live.largest,
        "peak_bytes": live.peak,
        "output_error": relative_error(out, expected[:, own.start : own.stop]),
        "gradient_error": relative_error(total, single.gradients),
    }


# --- by counting ---------------------------------------------------------------------------------------------------


def count(way: str, ranks: int, rank: int) -> dict[str, Any]:
    """The same row from the cuts alone. tests/test_fuse.py holds it to what runs."""
    source, columns = shard_tokens(VISUAL, ranks), shard_tokens(TOKENS, ranks)
    video = range(START, START + VISUAL)
    target = Shards(tuple(_common(columns.range(other), video) for other in range(ranks)))
    held, tokens, needed = source.sizes[rank], columns.sizes[rank], target.sizes[rank]
    if way == "routed":
        send, receive = moves(source, target, rank)
        sent, back = sum(send) - send[rank], sum(receive) - receive[rank]
        # At the end of the splice: what was projected, what came, the text of this rank, the result.
        largest, peak = max(held, tokens), held + needed + (tokens - needed) + tokens
    else:
        sent, back = held * (ranks - 1), VISUAL - held
        # At the end of masked_scatter: all features, all text, all of both.
        largest, peak = TOKENS, VISUAL + 2 * TOKENS
    sizes = {"sent_bytes_forward": sent, "sent_bytes_backward": back, "largest_bytes": largest, "peak_bytes": peak}
    return {"rank": rank} | {name: rows * ROW for name, rows in sizes.items()}


def _common(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


# --- the rows ------------------------------------------------------------------------------------------------------


def _rows(base: Row, found: dict[str, Any]) -> list[Row]:
    """Forward and backward of a rank."""
    ran = "output_error" in found
    base = replace(base, rank=found["rank"], kind="measured" if ran else "modelled")
    forward, backward = (
        replace(base, direction=d, sent_bytes=found[f"sent_bytes_{d}"], error=found.get(name))
        for d, name in (("forward", "output_error"), ("backward", "gradient_error"))
    )
    return [replace(forward, memory_bytes=found["peak_bytes"], largest_bytes=found["largest_bytes"]), backward]


def sweep(settings: Settings) -> int:
    """Measure what is not in fuse.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("fuse: its ranks are CPU processes; run it with --device cpu")
        return 2
    report, pool = settings.report("fuse"), RankPool()
    for ranks in (2, 4) if settings.quick else (2, 4, 8):
        for way, provider in WAYS.items():
            base = Row(
                "fuse", provider, f"video of {VISUAL} in {TOKENS} tokens of width {WIDTH}", ranks=ranks, tokens=TOKENS,
                longest=TOKENS, **settings.columns(),
            )  # fmt: skip
            if report.status(replace(base, kind="modelled")) is None:
                report.add(row for rank in range(ranks) for row in _rows(base, count(way, ranks, rank)))
            if ranks < 8 and report.status(base) is None and not settings.over:
                report.add(row for found in pool.run(run, way, ranks=ranks) for row in _rows(base, found))
    pool.close()
    print(report.path)
    return 0
