"""What `SPConfig(check=...)` and `SPConfig(verify=n)` cost a step of a 7B model, on CPU ranks that talk over gloo.

The model has all layers and all weights of LLaVA-1.5-7B, but narrow ones, and few tokens: so a step takes what it costs
the host of a GPU, and little computing. Checks are timed from when all ranks have come to them, so that nobody's being
late is part of it: the one before the forward, and the one at the start of the backward. With larger batches the one
before the forward is timed alone, without a layout of the batch: what is compared grows, the step of the host does not.

The CPU time of the process is what says something where ranks share cores; the wall clock has the waits for messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from tqdm import tqdm

import triton_sp
from perf.clock import WARM_UP, statistics
from perf.contest import Settings
from perf.engines import Size, build_llm
from perf.rows import Row
from triton_sp.ranks import collectives
from triton_sp.testing import RankPool
from triton_sp.wrappers import entry
from triton_sp.wrappers.inputs.described import prepare_on_all
from triton_sp.wrappers.install import installation_of

RANKS = (2, 4)
CHECKS = {f'check="{check}"': triton_sp.SPConfig(check=check) for check in ("off", "first", "always")}
PROOFS = {f"verify={every}": triton_sp.SPConfig(verify=every) for every in (0, 1)}
NARROW, LLM = "LLaVA-1.5-7B, narrow", "Llama LLM"
LAYERS = (24, 32)  # of the tower and of the decoder
IMAGE, PATCH, SIDE = 1, 14, 336
PATCHES = (SIDE // PATCH) ** 2  # of an image
SMALL = 64  # tokens of the step that is the yardstick
BATCHES = {8_192: 8, 131_072: 64}  # larger ones: tokens, and images of 336 x 336
STEP, FORWARD, BACKWARD = "step", "check before the forward", "check before the backward"
VALUES = "values of the weights"  # which the check before the forward looks at in one call of 100


class Stopwatch:
    """What one rank measures: milliseconds by direction, tokens and clock, and the bytes that were sent to compare."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, int, str], list[float]] = {}
        self.sent: dict[tuple[str, int], int] = {}

    @contextmanager
    def time(self, direction: str, tokens: int) -> Iterator[None]:
        """Add a block, after all ranks have come to it."""
        dist.barrier()
        with collectives.record() as ledger:
            wall, cpu = time.perf_counter(), time.process_time()
            yield
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        for clock, value in seconds.items():
            self.taken.setdefault((direction, tokens, clock), []).append(1e3 * value)
        self.sent[direction, tokens] = sum(size for name, size in ledger.entries if name == "agree")

    def results(self) -> dict[tuple[str, int, str], dict[str, Any]]:
        """The columns of rows, by direction, tokens and clock."""
        found = {key: statistics(times[WARM_UP:]) for key, times in self.taken.items()}
        return {key: {"sent_bytes": self.sent[key[:2]], **columns} for key, columns in found.items()}


def build(layers: tuple[int, int]) -> nn.Module:
    """The model."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(image_size=2 * PATCH, patch_size=PATCH, num_hidden_layers=layers[0], **size)
    text = hf.LlamaConfig(vocab_size=64, num_hidden_layers=layers[1], use_cache=False, **size)
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE}
    config = hf.LlavaConfig(**parts)
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").train()


def batch_of(text: int, images: int, side: int) -> dict[str, Tensor]:
    """Images, and text after them."""
    ids = torch.randint(2, 64, (1, text + images * (side // PATCH) ** 2))
    ids[:, :-text] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(images, 3, side, side)}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What a training loop does, but for the optimizer."""
    model.zero_grad()
    model(**batch).loss.backward()
    triton_sp.sync_gradients(model)


def measure_checks(layers: tuple[int, int], repeats: int) -> dict[str, dict[tuple[str, int, str], dict[str, Any]]]:
    """This rank's rows of each setting of `check`, which take turns."""
    found = {name: (triton_sp.wrap(build(layers), config=config), Stopwatch()) for name, config in CHECKS.items()}
    small, compare = batch_of(SMALL - 4, 1, 2 * PATCH), entry.agree_on_backward
    for _ in range(WARM_UP + repeats):
        for model, watch in found.values():

            def compared(*args: Any, watch: Stopwatch = watch) -> None:
                with watch.time(BACKWARD, SMALL):
                    compare(*args)

            with mock.patch.object(entry, "agree_on_backward", compared), watch.time(STEP, SMALL):
                step(model, small)
    for tokens, batch in [(SMALL, small), *((n, batch_of(n - m * PATCHES, m, SIDE)) for n, m in BATCHES.items())]:
        for _ in range(WARM_UP + repeats):
            for model, watch in found.values():
                installation: Any = installation_of(model)
                with watch.time(FORWARD, tokens):
                    prepare_on_all(installation, batch, lambda: None)
    for model, watch in found.values():
        installation = installation_of(model)
        for _ in range(WARM_UP + repeats):
            with watch.time(VALUES, SMALL):
                installation.state.value_lines()
    return {name: watch.results() for name, (_, watch) in found.items()}


def measure_proofs(tokens: int, repeats: int) -> dict[str, dict[tuple[str, int, str], dict[str, Any]]]:
    """The same of steps without a verification, and with one each."""
    found = {}
    for name, config in PROOFS.items():
        model, batch = build_llm(Size(0, tokens))
        found[name] = triton_sp.wrap(model, config=config), batch, Stopwatch()
    for _ in range(WARM_UP + repeats):
        for model, batch, watch in found.values():
            with watch.time(STEP, tokens):
                step(model, batch)
    return {name: watch.results() for name, (*_, watch) in found.items()}


def sweep(settings: Settings) -> int:
    """Measure what is not in agree.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("agree: its ranks are CPU processes; run it with --device cpu")
        return 2
    report, pool = settings.report("agree"), RankPool()
    layers, tokens, repeats = ((1, 1), 128, 2) if settings.quick else (LAYERS, 1024, 7)
    cases: list[tuple[str, int, Callable[..., Any], Any]] = [(NARROW, ranks, measure_checks, layers) for ranks in RANKS]
    cases.append((LLM, 2, measure_proofs, tokens))
    for case, ranks, measure, size in tqdm(cases, desc="agree", disable=None):
        common = Row("agree", "", case, ranks=ranks, layers=sum(layers) if case == NARROW else 2, **settings.columns())
        first = next(iter(CHECKS if case == NARROW else PROOFS))
        key = {"provider": first, "direction": f"{STEP}, wall", "tokens": SMALL if case == NARROW else tokens}
        if settings.over or report.status(replace(common, **key)):
            continue
        for rank, results in enumerate(pool.run(measure, size, repeats, ranks=ranks, timeout=1800.0)):
            report.add(
                replace(
                    common, provider=name, rank=rank, direction=f"{what}, {clock}", tokens=n, clock=clock, **columns
                )
                for name, found in results.items()
                for (what, n, clock), columns in found.items()
            )
    pool.close()
    print(report.path)
    return 0
