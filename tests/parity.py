"""One job of the parity suite: a wrapped model on this rank against the same model in one process.

The reference is the unwrapped model with its own attention. Its loss is formed here from its logits, in float64 where
the model runs in it: transformers' own rounds the logits to float32, which parity at 1e-10 cannot see past.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import zoo
from torch import Tensor, nn

import triton_sp
from triton_sp.testing import relative_error

transformers.logging.set_verbosity_error()
CHECKPOINTING = {"none": None, "reentrant": True, "non_reentrant": False}


@dataclass(frozen=True)
class Parity:
    """How far one rank was from the reference."""

    loss: float
    model_loss: float  # against the loss that transformers itself computes, in float32
    logits: float
    gradient: float
    worst: str
    losses: tuple[float, ...]  # of all ranks


def loss_of(out: Any, labels: Tensor | None) -> Tensor:
    if labels is None:
        return zoo.loss_of(out)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The worst relative error over parameters. A gradient that is mathematically zero is measured by the model's."""
    total = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    errors = {}
    for name, grad in expected.items():
        difference = float((found[name].double() - grad.double()).norm())
        errors[name] = difference / max(float(grad.double().norm()), 1e-5 * total, 1e-30)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def set_checkpointing(model: nn.Module, kind: str) -> None:
    reentrant = CHECKPOINTING[kind]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # it cuts the graph unless an input of the checkpoint needs a gradient
            model.enable_input_require_grads()


def run(
    name: str,
    batch_name: str,
    checkpointing: str = "none",
    gradient: str = "mean",
    gather: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
    group_ranks: list[int] | None = None,
) -> Parity:
    """Forward and backward, wrapped and not."""
    case = zoo.CASES[name]
    model, batch = case.build(case.dtype), case.batches[batch_name](case.dtype)
    if prepare is not None:
        prepare(model)
    reference = copy.deepcopy(model)
    labels = batch.get("labels")

    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    expected = reference(**unlabelled)
    expected_loss = loss_of(expected, labels)
    expected_loss.backward()
    with torch.no_grad():
        model_loss = expected_loss.detach() if labels is None else copy.deepcopy(reference)(**batch).loss

    set_checkpointing(model, checkpointing)
    config = triton_sp.SPConfig(gradient=gradient, gather_logits=gather)
    triton_sp.wrap(model, None if group_ranks is None else dist.new_group(group_ranks), config)
    out = model(**batch)
    loss = loss_of(out, None)
    loss.backward()
    triton_sp.sync_gradients(model)

    worst, which = gradient_error(gradients(model), gradients(reference))
    losses = [torch.zeros_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, loss.detach())
    result = Parity(
        relative_error(loss, expected_loss),
        relative_error(loss, model_loss),
        logits_error(out, expected, batch, gather),
        worst,
        which,
        tuple(float(x) for x in losses),
    )
    gc.collect()
    return result


def logits_error(out: Any, expected: Any, batch: dict[str, Tensor], gathered: bool) -> float:
    """Of this rank's tokens, found in the whole batch by their order."""
    if "labels" not in batch:
        return relative_error(out.last_hidden_state, expected.last_hidden_state)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if gathered:
        return relative_error(out.logits[mask], expected.logits[mask])
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    kept = (mask | (targets != -100)).flatten()
    tokens = expected.logits.flatten(0, 1)[kept]
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([out.logits.shape[1]]))
    assert sum(int(s) for s in sizes) == len(tokens), (sizes, len(tokens))
    start = sum(int(s) for s in sizes[: dist.get_rank()])
    return relative_error(out.logits[0], tokens[start : start + out.logits.shape[1]])


def run_all(name: str, plans: list[dict[str, Any]]) -> list[Parity]:
    return [run(name, **plan) for plan in plans]
