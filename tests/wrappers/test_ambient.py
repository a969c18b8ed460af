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
from triton_sp.wrappers import scope


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


def test_what_is_checkpointed_names_its_module() -> None:
    """LLaMA-Factory's and axolotl's checkpoints ask for it, the way transformers hands a layer to them."""
    seen, linear, x = [], torch.nn.Linear(2, 2), torch.ones(2)

    def asks(function, *args):
        seen.append((function.func if isinstance(function, partial) else function).__self__)
        return function(*args)

    linear._gradient_checkpointing_func = asks
    with scope.bound_checkpoints(linear):
        first = linear._gradient_checkpointing_func(partial(linear.__call__), x)
        second = linear._gradient_checkpointing_func(linear.__call__, x)
    assert seen == [linear, linear]
    assert torch.equal(first, linear(x)) and torch.equal(second, linear(x))
