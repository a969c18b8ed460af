"""One rank of P, alone: what it holds at its peak, and how long its step takes, for an 8B model on 1M visual tokens.

The model has Qwen3-VL-8B's architecture, random weights in bf16, checkpointing on, and a video as its input. It is
wrapped in a group of P ranks of which one runs (torch's "fake" process group): each exchange is replaced by a local
copy of the same size. So the numbers mean nothing, but tensors, kernels and bytes are those of the rank. Rows are
marked as modelled.

On a CPU the whole model is run without its floats (hollow.py), which gives the bytes that it allocates, to the last
layer and token. On a GPU a few layers are run on fewer frames; the time of the whole is by a formula, linear in layers
and tokens with a quadratic term for the language model's attention, solved from four runs and held to a fifth.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from tqdm import tqdm

import triton_sp
from perf.contest import Settings, failure
from perf.rows import Report, Row
from triton_sp.forecast.hollow import Hollow
from triton_sp.ops import dispatch
from triton_sp.ranks import collectives, groups

RANKS = 8
MILLION = 1 << 20
# Ranks that do not run cannot be compared; plans are those of GPUs with NVLink.
CONFIG = triton_sp.SPConfig(check="off", link="nvlink", chunked_loss=True)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are Qwen3-VL-8B's."""

    hidden: int = 4096
    inner: int = 12288
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 151936
    layers: int = 36
    vision: int = 1152
    vision_inner: int = 4304
    vision_layers: int = 27
    side: int = 32  # patches of a frame; a token of the language model is 2 x 2 of them

    @property
    def frame_tokens(self) -> int:
        return self.side**2 // 4


SMALL = Shape(256, 256, 8, 8, 512, 12, 144, 144, 9, 8)


@dataclass(frozen=True)
class Run:
    """What is replayed: layers of the tower and of the language model, frames of the video."""

    vision_layers: int
    layers: int
    frames: int


@dataclass(frozen=True)
class Found:
    """Bytes of everything at the peak, which on a CPU nobody counts, and milliseconds of a step."""

    bytes: int | None
    milliseconds: float


def build(shape: Shape, run: Run, device: torch.device) -> nn.Module:
    """The model with so many layers, its weights random."""
    vision = {
        "depth": run.vision_layers, "hidden_size": shape.vision, "intermediate_size": shape.vision_inner,
        "num_heads": 16 if shape.vision > 1000 else 2, "out_hidden_size": shape.hidden, "patch_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = hf.Qwen3VLTextConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=run.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections(shape)},
    )  # fmt: skip
    config = hf.Qwen3VLConfig(
        vision_config=vision, text_config=text.to_dict(), image_token_id=1, video_token_id=2, vision_start_token_id=3,
        vision_end_token_id=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = hf.Qwen3VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def sections(shape: Shape) -> list[int]:
    """How the rotary frequencies of a head are shared between time, height and width."""
    half = shape.hidden // shape.heads // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def video(shape: Shape, frames: int, device: torch.device) -> dict[str, Tensor]:
    """A batch: each frame between its timestamps' ids, then a question."""
    frame = torch.tensor([5, 6, 3, *[2] * shape.frame_tokens, 4])
    ids = torch.cat([frame.repeat(frames), torch.arange(7, 39)])[None]
    patches = torch.randn(frames * shape.side**2, 3 * 2 * 16 * 16, dtype=torch.bfloat16, device=device)
    batch = {
        "input_ids": ids, "labels": ids.masked_fill(ids == 2, -100), "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[frames, shape.side, shape.side]]), "mm_token_type_ids": 2 * (ids == 2).int(),
    }  # fmt: skip
    return {name: x.to(device) for name, x in batch.items()}


# --- the stand-ins -----------------------------------------------------------------------------------------------


@contextmanager
def alone_among(ranks: int, rank: int) -> Iterator[None]:
    """A process group in which only this rank runs: what it would receive is a copy of what it has."""

    def exchange(x: Tensor, receive: list[int], *_: Any) -> Tensor:
        size = sum(receive)
        out = x.new_zeros(size, *x.shape[1:])
        out[: len(x)].copy_(x[:size])
        return out

    with (
        groups.fake_world(ranks, rank),
        mock.patch.object(collectives, "all_to_all_single", exchange),
        mock.patch.object(collectives, "send_alike", exchange),
        mock.patch.object(funcol, "all_reduce", lambda x, *_: x.clone()),
        mock.patch.object(funcol, "wait_tensor", lambda x: x),
    ):
        yield


@dataclass(frozen=True)
class Account:
    """Bytes of parameters, of inputs, kept by the forward for the backward, and of everything at the peak."""

    parameters: int
    inputs: int
    kept: int
    peak: int


def account(shape: Shape, run: Run, ranks: int = RANKS) -> Account:
    """What the last of so many ranks allocates in a step with the GPU's kernels, counted without computing it."""
    from triton.runtime.jit import JITFunction

    from triton_sp.kernels import launch

    cpu = torch.device("cpu")
    with (
        Hollow() as hollow,
        mock.patch.object(dispatch, "portable", lambda device: "triton"),
        mock.patch.object(dispatch, "implementation", lambda device: "triton"),
        mock.patch.object(launch, "target", lambda: "cuda:90"),
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
    ):
        model = build(shape, run, cpu)
        parameters = hollow.now
        batch = video(shape, run.frames, cpu)
        inputs = hollow.now - parameters
        with alone_among(ranks, ranks - 1):
            triton_sp.wrap(model, config=CONFIG)
            loss = model(**batch).loss
            kept = hollow.now - parameters - inputs
            loss.backward()
    found = Account(parameters, inputs, kept, hollow.peak)
    del model, batch, loss
    gc.collect()
    return found


def replay(shape: Shape, run: Run, device: torch.device, ranks: int = RANKS) -> Found:
    """One step of the last rank, for real; on a GPU the second one, when kernels are compiled."""
    model, batch = build(shape, run, device), video(shape, run.frames, device)
    begin = end = 0.0
    with alone_among(ranks, ranks - 1):
        triton_sp.wrap(model, config=CONFIG)
        for _ in range(2 if device.type == "cuda" else 1):
            model.zero_grad(set_to_none=True)
            _settle(device)
            begin = time.perf_counter() if device.type == "cuda" else time.process_time()
            model(**batch).loss.backward()
            _settle(device)
            end = time.perf_counter() if device.type == "cuda" else time.process_time()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    del model, batch
    gc.collect()
    return Found(peak, 1e3 * (end - begin))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


# --- the rows ----------------------------------------------------------------------------------------------------


def terms(run: Run) -> list[float]:
    """What the milliseconds of a step are a sum of: frames, and frames by layers, and frames squared."""
    return [run.frames, run.frames * run.vision_layers, run.frames * run.layers, run.frames**2 * run.layers]


def fit(runs: dict[Run, float]) -> Callable[[Run], float]:
    """The formula that four runs determine.

    >>> truth = lambda run: 3 * run.frames + 2 * run.frames * run.layers
    >>> runs = [Run(1, 1, 8), Run(2, 1, 8), Run(1, 2, 8), Run(1, 1, 16)]
    >>> round(fit({run: truth(run) for run in runs})(Run(3, 3, 10)), 6)
    90.0
    """
    weights = np.linalg.solve([terms(run) for run in runs], list(runs.values()))
    return lambda run: float(weights @ terms(run))


def row_of(shape: Shape, run: Run, ranks: int, settings: Settings) -> Row:
    name = f"{'Qwen3-VL-8B' if shape == Shape() else 'small'}, video, {run.vision_layers} + {run.layers} layers"
    tokens = run.frames * shape.frame_tokens
    return Row(
        "model", "triton_sp", name, "step", kind="modelled", device=settings.device.type, dtype="bfloat16",
        ranks=ranks, rank=ranks - 1, layers=run.layers, tokens=tokens, segments=run.frames, longest=tokens,
        heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.hidden // shape.heads, causal=True,
    )  # fmt: skip


def accounts(settings: Settings) -> list[tuple[Shape, Run, int]]:
    """(shape, run, ranks), the most telling first."""
    if settings.quick:
        return [(SMALL, Run(2, 2, 8), 2)]
    whole = Shape()
    full = [(whole, Run(whole.vision_layers, whole.layers, frames), 8) for frames in (4096, 1024, 512, 256)]
    return full + [(whole, Run(whole.vision_layers, whole.layers, 256), ranks) for ranks in (1, 2, 4)]


def sweep(settings: Settings) -> int:
    """Measure what is not in single_rank.csv yet; the exit code."""
    report = settings.report("single_rank")
    for shape, run, ranks in tqdm(accounts(settings), desc="single_rank", disable=None):
        row = row_of(shape, run, ranks, settings)
        if settings.over or settings.device.type != "cpu" or report.status(row) is not None:
            continue
        try:
            found = account(shape, run, ranks)
        except Exception as error:
            report.add([replace(row, status=failure(error))])
            continue
        note = "allocations counted, nothing computed"
        row = replace(row, memory_bytes=found.peak, saved_bytes=found.kept, note=note)
        parts = {"parameters": found.parameters, "inputs": found.inputs}
        report.add([row, *(replace(row, direction=d, memory_bytes=n, saved_bytes=None) for d, n in parts.items())])
    if settings.device.type == "cuda" or settings.quick:
        _time_the_whole(settings, report)
    print(report.path)
    return 0


def _time_the_whole(settings: Settings, report: Report) -> None:
    """Replay a few layers, hold the peak to what is counted without computing, and reckon the time of the whole."""
    shape, unit = (SMALL, 4) if settings.quick else (Shape(), 256)
    runs = [Run(2, 2, unit), Run(4, 2, unit), Run(2, 4, unit), Run(2, 2, 2 * unit), Run(3, 3, unit * 3 // 2)]
    rows, times = dict[Run, Row](), dict[Run, float]()
    for run in runs:
        rows[run] = replace(row_of(shape, run, RANKS, settings), direction="replay", clock="wall", repeats=1)
        try:
            found = replay(shape, run, settings.device)
        except Exception as error:
            report.add([replace(rows[run], status=failure(error), repeats=None)])
            return
        times[run] = found.milliseconds
        rows[run] = replace(rows[run], median_ms=found.milliseconds, memory_bytes=found.bytes)
        report.add([rows[run]])
    formula = fit({run: times[run] for run in runs[:4]})
    deviation = formula(runs[4]) / times[runs[4]] - 1
    whole = Run(shape.vision_layers, shape.layers, MILLION // shape.frame_tokens)
    note = f"by a formula from 4 runs, which is {deviation:+.1%} off a fifth"
    row = replace(row_of(shape, whole, RANKS, settings), direction="time of a step", median_ms=formula(whole))
    report.add([replace(row, note=note)])
    for run, row in rows.items():
        if not settings.over:
            report.add([replace(row, note=f"without computing {account(shape, run).peak} bytes are counted")])
