"""What every rank of the demo runs: train each model as it is and wrapped, and write what was seen to a CSV file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from demo_data import HEADS, KV_HEADS, Job, jobs
from torch import Tensor, nn
from tqdm import tqdm

import triton_sp
from triton_sp.ranks import collectives
from triton_sp.testing import saved_activations

STEPS, LEARNING_RATE = 5, 3e-4


@dataclass
class Run:
    """What was seen in the training of one model.

    Attributes:
        gradients: of the first step, after `sync_gradients` if wrapped.
        sent: bytes of activations and their gradients that went to other ranks, for each step.
        saved: bytes that a forward kept for the backward.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    sent: list[int]
    saved: int
    vision_tokens: int
    text_tokens: int


@contextmanager
def tokens_through(model: nn.Module, name: str) -> Iterator[list[int]]:
    """How many tokens a module computes on."""
    counts: list[int] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:-1].numel()))
    yield counts
    handle.remove()


def train(model: nn.Module, job: Job, device: torch.device, wrapped: bool, bar: Any) -> Run:
    """A plain training loop. The one line in it that is triton_sp's own is `sync_gradients`."""
    model.to(device)
    batch = {name: value.to(device) for name, value in job.batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    run = Run([], {}, [], 0, 0, 0)
    for step in range(STEPS):
        optimizer.zero_grad()
        with collectives.record() as ledger:
            probes = tokens_through(model, job.vision_probe), tokens_through(model, job.text_probe)
            with probes[0] as vision, probes[1] as text, saved_activations(model) as saved:
                loss = model(**batch).loss
            loss.backward()
        if wrapped:
            triton_sp.sync_gradients(model)
        if step == 0:
            run.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        run.losses.append(loss.item())
        run.sent.append(ledger.bytes)
        run.saved, run.vision_tokens, run.text_tokens = saved[0], vision[0], text[0]
        bar.set_postfix_str(f"{job.name}, {'sequence-parallel' if wrapped else 'one process'}, loss {loss.item():.4f}")
        bar.update()
    return run


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst relative error over all parameters; NaN if there is one. A gradient that is zero by mathematics, and
    noise in floating point (the bias of a key without rotary positions), is measured by the size of the whole."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = []
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        errors.append((gradient - wanted).norm() / torch.maximum(wanted.norm(), 1e-5 * total))
    return torch.stack(errors).max().item()


def compare(job: Job, device: torch.device, bar: Any) -> list[dict[str, Any]]:
    """Train on one process and sequence-parallel; this rank's rows of the report. Every rank does the first by itself,
    so that each can check its own gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = train(job.build(), job, device, False, bar)
    model = triton_sp.wrap(job.build())
    if rank == 0:
        bar.write(f"{job.photographs}\n{triton_sp.explain(model)}\n")
    shared = train(model, job, device, True, bar)
    identity = {"model": job.name, "ranks": ranks, "rank": rank}
    seen = {
        "vision_tokens": shared.vision_tokens,
        "vision_tokens_one_process": alone.vision_tokens,
        "decoder_tokens": shared.text_tokens,
        "decoder_tokens_one_process": alone.text_tokens,
        "query_heads": HEADS // ranks,
        "query_heads_one_process": HEADS,
        "decoder_kv_heads": max(1, KV_HEADS // ranks),  # one that several ranks need is copied
        "decoder_kv_heads_one_process": KV_HEADS,
        "saved_activation_bytes": shared.saved,
        "saved_activation_bytes_one_process": alone.saved,
        "gradient_error_step_1": gradient_error(shared.gradients, alone.gradients),
    }
    steps = zip(shared.losses, alone.losses, shared.sent, strict=True)
    return [
        {**identity, "step": step, "loss": loss, "loss_one_process": expected, "sent_bytes": sent, **seen}
        for step, (loss, expected, sent) in enumerate(steps, 1)
    ]


class Dots:
    """Progress where the output is no terminal: a dot a step, all on one line; what is to be written follows it."""

    def __init__(self, steps: int) -> None:
        self.written: list[str] = []
        print(f"{steps} steps: ", end="", flush=True)

    def __enter__(self) -> Dots:
        return self

    def __exit__(self, *_: Any) -> None:
        print("\n", *self.written, sep="\n", flush=True)

    def set_postfix_str(self, text: str) -> None:
        """A line cannot be changed here."""

    def update(self) -> None:
        print(".", end="", flush=True)

    def write(self, text: str) -> None:
        self.written.append(text)


def main(csv: Path) -> None:
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    rows: list[dict[str, Any]] = []
    todo = jobs()
    steps, first = 2 * len(todo) * STEPS, dist.get_rank() == 0
    terminal = sys.stderr.isatty() or not first
    with tqdm(total=steps, unit="step", disable=not first, dynamic_ncols=True) if terminal else Dots(steps) as bar:
        for job in todo:
            rows += compare(job, device, bar)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows)
    if dist.get_rank() == 0:
        pd.DataFrame([row for part in zip(*found, strict=True) for row in part]).to_csv(csv, index=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
