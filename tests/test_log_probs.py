"""Scores of labels, token by token: against one process, whole and with all gradients, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from kit import parity, zoo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ModelOutput

import triton_sp
from triton_sp import SPConfig, TokenScores
from triton_sp.errors import SPError
from triton_sp.testing import RankError, relative_error


@dataclass
class Fused(ModelOutput):
    """What TRL's fused heads return, as far as these tests look."""

    loss: Any = None
    log_probs: Any = None
    entropy: Any = None
    is_top1: Any = None
    label_mask: Any = None


def by_hand(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> TokenScores:
    log_p = (logits[:, :-1].double() / temperature).log_softmax(-1)
    mask = labels[:, 1:] != -100
    chosen = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    top1 = log_p.argmax(-1) == labels[:, 1:]
    return TokenScores(chosen * mask, entropy * mask, top1 & mask, mask)


def loss_of(scores: Any) -> Tensor:
    """One that weighs each token otherwise."""
    weights = torch.linspace(-1, 2, scores.log_probs.numel(), dtype=torch.float64).view_as(scores.log_probs)
    return (weights * scores.log_probs).sum() + (weights.flip(1) * scores.entropy).square().sum()


def add_fused_head(model: nn.Module) -> None:
    """As TRL does it: a forward of its own, which calls the base model past the model's and forms scores itself."""
    original = model.forward

    def forward(self: Any, *, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None, **rest: Any):
        if not fused_lm_head:
            return original(labels=labels, **rest)
        hidden = self.base_model(**rest).last_hidden_state
        assert shift_labels.shape == hidden.shape[:2], "this rank's tokens and their labels"
        logits = self.get_output_embeddings()(hidden)
        padded = [
            nn.functional.pad(x, pad, value=v) for x, pad, v in ((logits, (0, 0, 0, 1), 0), (shift_labels, (1, 0), 0))
        ]
        return Fused(**by_hand(*padded, temperature=1.5)._asdict())

    model.forward = MethodType(forward, model)


def compare(name: str, batch_name: str, head: str, options: dict[str, Any]) -> None:
    """`head`: whose it is, and where a trainer puts it on."""
    case, tolerance = zoo.CASES[name], parity.TOLERANCE[zoo.CASES[name].dtype]
    model, batch = case.build(case.dtype), case.batches[batch_name](case.dtype)
    reference = copy.deepcopy(model)
    labels = batch["labels"]
    expected = by_hand(reference(**{k: v for k, v in batch.items() if k != "labels"}).logits, labels, 1.5)
    if head == "first":
        add_fused_head(model)
    triton_sp.wrap(model, config=SPConfig(plan="heads", **options))
    if head == "last":
        add_fused_head(model)
        triton_sp.wrap(model, config=SPConfig(plan="heads", **options))
    if head == "ours":
        engine = DistributedDataParallel(model, find_unused_parameters=True)
        found: Any = triton_sp.log_probs(engine, batch, temperature=1.5)
    else:
        found = model(**batch, fused_lm_head=True)
        assert type(found) is Fused
        assert relative_error(found.loss, -expected.log_probs.sum() / expected.label_mask.sum()) < tolerance
        assert model(**batch).loss > 0, "the plain forward is still there"
    for field in TokenScores._fields:
        value = getattr(found, field)
        assert value.shape == labels[:, 1:].shape
        assert relative_error(value.double(), getattr(expected, field).double()) < tolerance, field
    loss_of(expected).backward()
    loss_of(found).backward()
    if head != "ours":
        triton_sp.sync_gradients(model)
    assert parity.gradient_error(parity.gradients(model), parity.gradients(reference))[0] < tolerance
    if head == "last":
        triton_sp.unwrap(model)
        out = model(**batch)
        assert out.logits.shape[:2] == labels.shape, "what the trainer had put over ours leads to the model's own"


@pytest.mark.parametrize(
    ("name", "batch", "head", "options"),
    [
        ("llama", "left_pad", "ours", {}),
        ("gemma2", "right_pad", "ours", {}),  # with a soft cap
        ("qwen2_5_vl", None, "ours", {}),
        ("llama", "right_pad", "first", {"gradient": "sum"}),
        ("llava", "right_pad", "last", {}),
    ],
)
def test_scores(ranks, name: str, batch: str | None, head: str, options: dict[str, Any]) -> None:
    ranks.run(compare, name, batch or next(iter(zoo.CASES[name].batches)), head, options, ranks=2)


def alone(options: dict[str, Any]) -> None:
    model = zoo.CASES["llama"].build(torch.float64)
    batch = zoo.CASES["llama"].batches["right_pad"](torch.float64)
    expected = by_hand(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    found = triton_sp.log_probs(triton_sp.wrap(model, config=SPConfig(**options)), batch)
    assert all(relative_error(x.double(), y.double()) < 1e-12 for x, y in zip(found, expected, strict=True))


def wrong(what: str) -> None:
    model = zoo.CASES["llama"].build(torch.float64)
    batch = zoo.CASES["llama"].batches["plain"](torch.float64)
    if what == "unwrapped":
        triton_sp.log_probs(model, batch)
    triton_sp.wrap(model)
    if what == "labels":
        triton_sp.log_probs(model, {"input_ids": batch["input_ids"]})
    elif what == "fused":
        model(input_ids=batch["input_ids"], fused_lm_head=True)
    elif what == "head":
        triton_sp.log_probs(triton_sp.wrap(triton_sp.unwrap(model).model), batch)
    triton_sp.log_probs(model, batch, temperature=0.0)


@pytest.mark.parametrize(
    "options", [{}, {"single": True}, {"chunked_loss": True}], ids=lambda options: "".join(options)
)
def test_alone(ranks, options: dict[str, bool]) -> None:
    ranks.run(alone, options, ranks=1)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("unwrapped", "call wrap first"),
        ("labels", "labels: expected a tensor"),
        ("fused", "labels: expected labels"),
        ("temperature", "a positive number, found 0.0"),
    ],
)
def test_refusals(ranks, what: str, found: str) -> None:
    with pytest.raises(RankError, match=found) as caught:
        ranks.run(wrong, what, ranks=2)
    assert all(isinstance(error, SPError) for error in caught.value.errors.values())
