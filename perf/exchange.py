"""What attention costs a rank in one process, here and in DeepSpeed: collectives, bytes, work, memory, time, errors.

    python perf/exchange.py [ranks ...]      default 2 4; three to four minutes on two busy cores
    pip install 'triton-sp[peers]'           for the rows of DeepSpeed; without it they say so

Ranks are processes on this machine that talk over gloo, one thread each. All providers run the same weights on the same
batch: a SigLIP tower on one image, a Llama on one document. DeepSpeed is fed as its own tests feed it: each rank its
part of the patches (`UlyssesSPViTAttention`, AutoSP), each rank its part of the ids with their positions
(`UlyssesSPAttentionHF`, ALST). Everything is counted at the same places for all: collectives where torch.distributed is
called, attention where scaled_dot_product_attention is.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import pathlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import Report, cpu
from providers import DEEPSPEED, LAYERS, MODELS, ONE, OURS, prepare
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol

from triton_sp.testing import RankError, RankPool, relative_error, saved_activations

REPEATS = 5
CORRECT = 1e-4  # of gradients in float32, relative to one process
FIELDS = [
    "provider", "model", "ranks", "rank", "status", "layers", "tokens", "layer_collectives_forward",
    "collectives_forward", "collectives_backward", "sent_bytes_forward", "sent_bytes_backward",
    "attention_flops_forward", "saved_bytes", "step_seconds_median", "step_seconds_p20", "step_seconds_p80", "repeats",
    "loss_error", "gradient_error", "backend", "threads", "cpu", "cores", "transformers", "deepspeed",
]  # fmt: skip


# --- counting ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a rank did: collectives by name, those inside attention modules, bytes to other ranks, attention FLOPs."""

    collectives: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    flops: int = 0
    depth: int = 0

    def collective(self, name: str, arguments: dict[str, Any]) -> None:
        self.collectives[name] += 1
        self.inside[name] += self.depth > 0
        x = next(arguments[key] for key in ("input", "self", "tensor", "input_tensor") if key in arguments)
        ranks, size = dist.get_world_size(), x.numel() * x.element_size()
        if name == "all_to_all_single":  # all but the part for this rank itself
            splits = arguments.get("input_split_sizes")
            self.sent += size - (size * splits[dist.get_rank()] // max(sum(splits), 1) if splits else size // ranks)
        else:  # a gather sends what a rank has to each other rank; a reduction is counted as its payload, once
            self.sent += size * (ranks - 1) if "gather" in name else size

    def attention(self, query: Tensor, key: Tensor, causal: bool) -> None:
        """Two products over the pairs of a row and a key that the mask lets through."""
        *heads, rows, dim = query.shape
        pairs = rows * (rows + 1) // 2 if causal else rows * key.shape[-2]
        self.flops += 4 * int(np.prod(heads)) * pairs * dim


@contextmanager
def counted(model: nn.Module) -> Iterator[Tally]:
    """Count what runs inside, the backward too, by standing in front of the functions that everyone calls."""
    tally = Tally()

    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            tally.collective(original.__name__, signature.bind(*args, **kwargs).arguments)
            return original(*args, **kwargs)

        return call

    attend = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tally.attention(query, key, kwargs.get("is_causal", False))
        return attend(query, key, *args, **kwargs)

    def step(change: int) -> Callable[..., None]:
        return lambda *_: setattr(tally, "depth", tally.depth + change)

    names = ["all_to_all_single", "all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"]
    doors = [(dist, name) for name in names]
    doors += [(funcol, name) for name in ("all_to_all_single", "all_gather_tensor", "all_reduce")]
    patches = [mock.patch.object(place, name, stand_in(getattr(place, name))) for place, name in doors]
    patches.append(mock.patch.object(F, "scaled_dot_product_attention", attention))
    blocks = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    hooks = [block.register_forward_pre_hook(step(1)) for block in blocks]
    hooks += [block.register_forward_hook(step(-1)) for block in blocks]
    for patch in patches:
        patch.start()
    try:
        yield tally
    finally:
        for undo in (*(patch.stop for patch in patches), *(hook.remove for hook in hooks)):
            undo()


def listed(counts: Counter[str], per: int = 1) -> str:
    """ "2 all_gather + 1 all_reduce", or "0"."""
    return " + ".join(f"{count / per:g} {name}" for name, count in sorted(counts.items()) if count) or "0"


def measure(provider: str, name: str, expected: pathlib.Path) -> dict[str, Any]:
    """This rank's row. The one process writes what it found to `expected`, the others compare with it."""
    runner = prepare(provider, name)
    model = runner.model
    with runner.around():
        with counted(model) as forward, saved_activations(model) as saved:
            loss = runner.forward()
        with counted(model) as backward:
            loss.backward()
        runner.combine(model)
        total = loss.detach().clone()
        if runner.shared:
            dist.all_reduce(total)
        # One vector of all gradients, under the names of the plain model; zeros where there is none.
        gradient = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for _, p in sorted((n.replace(".attn.", "."), p) for n, p in model.named_parameters())
            ]
        )
        if provider == ONE:
            torch.save((total, gradient), expected)
        wanted = torch.load(expected)
        errors = [relative_error(found, right) for found, right in zip((total, gradient), wanted, strict=True)]

        seconds = []
        for _ in range(REPEATS):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            runner.forward().backward()
            seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds, [20, 50, 80]).round(4).tolist()
    return {
        "rank": dist.get_rank(),
        "status": "ok" if max(errors) < CORRECT else "wrong",
        "layer_collectives_forward": listed(forward.inside, LAYERS),
        "collectives_forward": listed(forward.collectives),
        "collectives_backward": listed(backward.collectives),
        "sent_bytes_forward": forward.sent,
        "sent_bytes_backward": backward.sent,
        "attention_flops_forward": forward.flops,
        "saved_bytes": saved[0],
        "step_seconds_median": median,
        "step_seconds_p20": low,
        "step_seconds_p80": high,
        "repeats": REPEATS,
        "loss_error": errors[0],
        "gradient_error": errors[1],
        "threads": torch.get_num_threads(),
    }


# --- the report --------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def attempt(pool: RankPool, provider: str, name: str, ranks: int, expected: pathlib.Path) -> list[dict[str, Any]]:
    """The ranks' rows, or one that says what went wrong: nothing about a peer stops the others."""
    if provider == DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        return [{"status": "error: deepspeed is not installed (pip install 'triton-sp[peers]')"}]
    try:
        return pool.run(measure, provider, name, expected, ranks=ranks, timeout=120.0)
    except (RankError, TimeoutError, EOFError) as error:  # EOFError: a rank is gone
        first = next(iter(error.errors.values())) if isinstance(error, RankError) else error
        pool.close()
        return [{"status": f"error: {type(first).__name__}: {str(first)[:200]}"}]


def table(rows: pd.DataFrame) -> str:
    """Markdown, a line for each run: the rank that has most. A provider that is wrong has no time."""

    def shown(row: pd.Series) -> list[str]:
        if row.status.startswith("error"):
            return [row.status, *[""] * 8]
        time = f"{row.step_seconds_median:.2f} ({row.step_seconds_p20:.2f}-{row.step_seconds_p80:.2f})"
        errors = f"{row.loss_error:.0e}, {row.gradient_error:.0e}"
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("sent_bytes_forward", "sent_bytes_backward")]
        work = [f"{row.attention_flops_forward / 1e9:.2f}", f"{row.saved_bytes / 1e6:.1f}"]
        counts = [row.layer_collectives_forward, row.collectives_backward]
        return [row.status, *counts, *sizes, *work, time if row.status == "ok" else "-", errors]

    head = ["model", "P", "provider", "result", "collectives in a layer, forward", "collectives, backward",
            "MB sent, forward", "backward", "attention GFLOP, forward", "MB saved", "s a step (p20-p80)",
            "error of loss, gradients"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    rows = rows.sort_values("model", ascending=False, kind="stable")
    for (name, ranks, provider), part in rows.groupby(["model", "ranks", "provider"], sort=False):
        worst = part.select_dtypes("number").max()
        row = part.iloc[0].copy()
        row[worst.index] = worst
        lines.append([name, str(ranks), provider, *shown(row)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(sizes: list[int]) -> None:
    report = Report("exchange", FIELDS)
    shared = {"layers": LAYERS, "backend": "gloo", "cpu": cpu(), "cores": os.cpu_count()}
    shared |= {package: version(package) for package in ("transformers", "deepspeed")}
    with tempfile.TemporaryDirectory() as place:
        for ranks in (1, *sizes):
            pool = RankPool()  # DeepSpeed leaves its groups in globals: new processes for each size
            for name, (_, tokens) in MODELS.items():
                for provider in (ONE,) if ranks == 1 else (OURS, DEEPSPEED):
                    for row in attempt(pool, provider, name, ranks, pathlib.Path(place) / name):
                        report.add(provider=provider, model=name, ranks=ranks, tokens=tokens, **(shared | row))
            pool.close()
    print(table(pd.read_csv(report.path)))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [2, 4])
