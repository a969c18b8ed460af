"""What a wrapped model returns: gathered logits, hidden states, losses and gradients, whatever the caller asks for."""

from __future__ import annotations

import copy

import pytest
import torch
from kit import parity, tiny, zoo
from kit.parity import wrap

import triton_sp
from triton_sp import SPConfig
from triton_sp.testing import relative_error


def gathered_logits(name: str, batch_name: str) -> None:
    model, batch = zoo.CASES[name].model().eval(), zoo.CASES[name].batch(batch_name)
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits
        wrap(model, gather_logits=True)
        out = model(**batch)
    mask = batch.get("attention_mask", torch.ones_like(labels)).bool()
    assert out.loss is None
    assert out.logits.shape == expected.shape
    assert relative_error(out.logits[mask], expected[mask]) < 1e-10
    assert not out.logits[~mask].any()
    as_tuple = model(**batch, labels=labels, return_dict=False)
    whole = model(**batch, labels=labels)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], whole.loss) and torch.equal(as_tuple[1], whole.logits)


def test_gather_logits(ranks) -> None:
    ranks.run(gathered_logits, "llama", "right_pad", ranks=3)
    ranks.run(gathered_logits, "llava", "right_pad", ranks=2)


def headless(gather: bool) -> None:
    """The base model, whose loss the caller forms from all hidden states."""
    model, batch = zoo.CASES["llama"].model().model, zoo.CASES["llama"].batch()
    del batch["labels"]
    reference = copy.deepcopy(model)
    expected = reference(**batch).last_hidden_state
    wrap(model, gather_logits=True, gradient="mean" if gather else "sum")
    out = model(**batch).last_hidden_state
    assert relative_error(out, expected) < 1e-10
    expected.square().sum().backward()
    out.square().sum().backward()
    triton_sp.sync_gradients(model)
    assert parity.gradient_error(parity.gradients(model), parity.gradients(reference))[0] < 1e-10


@pytest.mark.parametrize("gather", [True, False])
def test_base_model(ranks, gather: bool) -> None:
    ranks.run(headless, gather, ranks=2)


def hidden_states_of_a_tower(gradient: str) -> None:
    model, batch = zoo.CASES["clip_vision"].model(), zoo.CASES["clip_vision"].batch()
    reference = copy.deepcopy(model)
    wrap(model, gradient=gradient)
    found, expected = (m(**batch, output_hidden_states=True).hidden_states for m in (model, reference))
    assert len(found) == len(expected)
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))
    for states in (found, expected):
        sum(x.square().sum() for x in states).backward()
    triton_sp.sync_gradients(model)
    assert parity.gradient_error(parity.gradients(model), parity.gradients(reference))[0] < 1e-10


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_hidden_states(ranks, gradient: str) -> None:
    ranks.run(hidden_states_of_a_tower, gradient, ranks=2)


@pytest.mark.parametrize("name", ["llava", "vit"])
def test_gradient_sum(ranks, reference, name: str) -> None:
    batch = "right_pad" if name == "llava" else "plain"
    plan = parity.Plan(batch, config=SPConfig(gradient="sum", plan="heads"))
    for results in ranks.run(parity.run_all, name, [plan], {batch: reference(name, batch)}, ranks=3):
        results[0].assert_within(parity.TOLERANCE[torch.float64])


def losses() -> None:
    """num_items_in_batch, no label at all, and fewer tokens than ranks."""
    model, batch = zoo.CASES["llama"].model(), zoo.CASES["llama"].batch("left_pad")
    reference = copy.deepcopy(model)
    wrap(model)
    for items in (7, torch.tensor(7)):
        counted = batch | {"num_items_in_batch": items}
        parity.assert_close(parity.step(model, counted), parity.step(reference, counted), 1e-5)

    loss, grads = parity.step(model, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_losses(ranks) -> None:
    ranks.run(losses, ranks=4)


def fewer_tokens_than_ranks(name: str) -> None:
    """Two tokens of text; of an image a single merged patch."""
    model = zoo.CASES[name].model()
    ids = torch.tensor([[11, 7]])
    batch = {"input_ids": ids, "labels": ids}
    if name == "qwen2_5_vl":
        ids = torch.tensor([[tiny.VISION_START, tiny.IMAGE, tiny.VISION_END]])
        batch = {"input_ids": ids, "labels": ids, "mm_token_type_ids": (ids == tiny.IMAGE).int()}
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        batch["pixel_values"] = tiny.pixels(4, 3 * 2 * tiny.PATCH**2, dtype=torch.float64)
    expected = parity.step(copy.deepcopy(model), batch)
    parity.assert_close(parity.step(wrap(model), batch), expected, 1e-5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parity.assert_close(parity.step(model, batch), expected, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2_5_vl"])
def test_fewer_tokens_than_ranks(ranks, name: str) -> None:
    ranks.run(fewer_tokens_than_ranks, name, ranks=4)
