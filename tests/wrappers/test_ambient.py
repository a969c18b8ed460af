"""Decoders whose layers do not hand keywords on to their attention: the scope is that of the call that is active."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from kit import parity
from torch.utils.checkpoint import checkpoint
from zoo.batches import packed_batch, text_batch
from zoo.build import build

import triton_sp
from triton_sp.errors import UnsupportedModelError
from triton_sp.testing import relative_error


def _checkpointed(reentrant: bool | None) -> tuple[float, float]:
    """The worst errors of the loss and of a gradient."""
    torch.set_num_threads(1)
    model = build("stablelm", "StableLmForCausalLM", "causal")
    wrapped = triton_sp.wrap(copy.deepcopy(model), config=triton_sp.SPConfig(plan="heads"))
    if reentrant is not None:
        wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    errors = []
    for make in (text_batch, packed_batch):
        batch = make(torch.Generator().manual_seed(0))
        expected, found = parity.step(model, batch), parity.step(wrapped, batch)
        errors.append((relative_error(found[0], expected[0]), parity.gradient_error(found[1], expected[1])[0]))
    return max(errors)


@pytest.mark.parametrize(("size", "reentrant"), [(2, None), (3, True), (3, False)])
def test_the_scope_is_found_with_either_kind_of_checkpointing(ranks, size: int, reentrant: bool | None) -> None:
    for loss, gradient in ranks.run(_checkpointed, reentrant, ranks=size):
        assert loss <= 1e-6 and gradient <= 1e-6


def _foreign() -> str:
    model = build("stablelm", "StableLmForCausalLM", "causal")
    triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads", trial="off"))
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    loss = model(**text_batch(torch.Generator().manual_seed(0))).loss
    with pytest.raises(UnsupportedModelError) as raised:
        loss.backward()
    return str(raised.value)


def test_a_checkpoint_that_loses_the_scope_is_refused(ranks) -> None:
    for text in ranks.run(_foreign, ranks=2):
        assert "gradient_checkpointing_enable" in text
