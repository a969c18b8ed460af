"""Per-token scores of a wrapped model, on every rank, in the place of a loss: for `triton_sp.log_probs`, and for
trainers that have put a fused head on the model and ask for it by `fused_lm_head=True`, as TRL's do.

A fused head of a trainer's own keeps what it was made with, its temperature and kernels: it runs on this rank's tokens,
and what it answers for each of them is gathered.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError
from triton_sp.loss import IGNORE, shift
from triton_sp.wrappers.inputs.layout import TextCall, gather_tokens
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.losses.token_scores import HeadScores
from triton_sp.wrappers.scope import active

FUSED = "fused_lm_head"


class TokenScores(NamedTuple):
    """The scores of each label of a batch except the first of a row, (B, S - 1); 0 where the label is -100.

    Attributes:
        log_probs: the logarithm of the label's probability, in fp32 or wider.
        entropy: the entropy of the distribution at its position, in the same dtype.
        is_top1: bool, whether the label is the most probable token.
        label_mask: bool, whether the label is not -100.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    label_mask: Tensor


@dataclass(frozen=True)
class ScoreRequest:
    """A call's request for scores in place of a loss. `by_trainer`: those of a trainer's fused head."""

    temperature: float = 1.0
    by_trainer: bool = False


_asked: ContextVar[ScoreRequest | None] = ContextVar("triton_sp_scores", default=None)


@contextmanager
def asking(request: ScoreRequest) -> Iterator[None]:
    """What is called meanwhile returns scores, whatever engine the model is in."""
    token = _asked.set(request)
    try:
        yield
    finally:
        _asked.reset(token)


def requested(override: Override, arguments: dict[str, Any]) -> ScoreRequest | None:
    """The scores that a call of the wrapped model asks for."""
    if not arguments.get(FUSED):
        arguments.pop(FUSED, None)
        return _asked.get()
    if arguments.get("labels") is None:
        raise InputError("labels", expected="labels, -100 where no score is wanted", found="none", remedy="pass labels")
    theirs: Any = override.shadowed
    takes = () if theirs is None else inspect.signature(theirs, follow_wrapped=False).parameters
    if FUSED in takes and "shift_labels" not in takes:
        raise InputError(
            FUSED,
            expected="a fused head whose forward takes shift_labels, those of the tokens that it is given",
            found=f"one that takes {', '.join(takes)}",
            remedy="wrap the model without it, and call triton_sp.log_probs",
        )
    return ScoreRequest(by_trainer=FUSED in takes)


def answer(
    override: Override, arguments: dict[str, Any], call: TextCall, labels: Tensor, targets: Tensor, asked: ScoreRequest
) -> Any:
    """Run the model on this rank's tokens; return their scores and those of the other ranks', (B, S - 1).

    Args:
        labels: (B, S). targets: (B, S), shifted.
    """
    local_T = targets.flatten()[call.local_index]
    installation, mask = override.installation, labels[:, 1:] != IGNORE
    if asked.by_trainer:
        return _by_trainer(override, arguments, call, local_T, mask)
    arguments.pop(FUSED, None)
    arguments.pop("num_items_in_batch", None)
    scores = HeadScores.of(override.module, local_T, asked.temperature)
    with active(call), scores.active():
        out = override.original(**arguments, return_dict=True)
    local = scores.take(out.logits, check=not installation.head_verified)
    installation.head_verified = True
    return as_fields(gather_tokens(local[None], call, installation)[:, :-1], mask)


def _by_trainer(override: Override, arguments: dict[str, Any], call: TextCall, local_T: Tensor, mask: Tensor) -> Any:
    items = arguments.pop("num_items_in_batch", None)
    with active(call):
        out = override.original(**arguments, shift_labels=local_T[None])
    fields = dict(out.items())
    names = [name for name, value in fields.items() if value.shape == (1, len(local_T)) and name != "label_mask"]
    local = torch.stack([fields[name].to(fields["log_probs"].dtype) for name in names], -1)
    whole = gather_tokens(local, call, override.installation)[:, :-1]
    gathered = {name: whole[..., i].to(fields[name].dtype) for i, name in enumerate(names)}
    loss = -gathered["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    return type(out)(**fields | gathered | {"loss": loss, "label_mask": mask})


def as_fields(scores: Tensor, mask: Tensor) -> TokenScores:
    """(B, S - 1, 3) by name."""
    log_probs, entropy, top1 = scores.unbind(-1)
    return TokenScores(log_probs, entropy, top1.bool(), mask)


def score_alone(installation: Installation, model: nn.Module, batch: dict[str, Any], request: ScoreRequest) -> Any:
    """On one rank, where the model's forward is its own. `model` is the entry or what an engine has put around it."""
    labels = batch["labels"]
    targets = shift(labels).flatten()
    scores = HeadScores.of(installation.anatomy.entry, targets, request.temperature)
    inputs = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    with scores.active():
        out = model(**inputs, return_dict=True)
    local = scores.take(out.logits, check=True)
    return as_fields(local.view(*labels.shape, 3)[:, :-1], labels[:, 1:] != IGNORE)
