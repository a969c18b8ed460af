"""What people do to a model after wrap: each comes out as in one process, or is refused with a remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp import SPConfig, errors


def layers(model: Any) -> nn.ModuleList:
    return model.model.language_model.layers


def resize(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(tiny.VOCAB + 6, mean_resizing=False)


def add_adapter(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    inject_adapter_in_model(adapter, model.model.language_model)  # what add_adapter of transformers calls


def replace_layer(model: Any) -> None:
    """With a new one: its attention is not overridden."""
    torch.manual_seed(0)
    layers(model)[1] = type(layers(model)[1])(model.config.text_config, 1).to(torch.float64).train()


def replace_mlp(model: Any) -> None:
    torch.manual_seed(0)
    layers(model)[1].mlp = type(layers(model)[1].mlp)(model.config.text_config).to(torch.float64)


def dropout(model: Any) -> None:
    for layer in layers(model):
        layer.self_attn.attention_dropout = 0.5


def tower_dropout(model: Any) -> None:
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5


def thaw_again(model: Any) -> None:
    freeze(model)
    model.requires_grad_(True)


def freeze(model: Any) -> None:
    model.model.vision_tower.requires_grad_(False)
    layers(model)[0].requires_grad_(False)


# What is done to the model, wrapped and not; and the error, or None where the result is right.
CHANGES: dict[str, tuple[Callable[[Any], Any], type[errors.SPError] | None]] = {
    "resize_token_embeddings": (resize, None),
    "add_adapter": (add_adapter, None),
    "eager attention": (lambda model: model.set_attn_implementation("eager"), None),
    "sdpa attention": (lambda model: model.set_attn_implementation("sdpa"), None),
    "attention dropout": (dropout, errors.UnsupportedModelError),
    "attention dropout of the tower": (tower_dropout, errors.UnsupportedModelError),
    "another dtype": (lambda model: model.to(torch.float32), None),
    "a layer replaced": (replace_layer, errors.UnsupportedModelError),
    "an MLP replaced": (replace_mlp, None),
    "a layer fewer": (lambda model: layers(model).pop(1), errors.UnsupportedModelError),
    "checkpointing": (lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}), None),
    "reentrant checkpointing": (lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}), None),
    "frozen": (freeze, None),
    "frozen and thawed": (thaw_again, None),
}


TOLERANCES = {"another dtype": 1e-5, "eager attention": 1e-4}  # transformers' eager softmax is in float32


def compare(names: list[str]) -> None:
    """A step after each change, made before the first step and after one."""
    for name in names:
        case, (change, error) = zoo.CASES["llava"], CHANGES[name]
        dtype = torch.float32 if name == "another dtype" else torch.float64
        batch, expected = case.batch("right_pad", dtype), case.model()
        change(expected)
        wanted = None if error else parity.exact_step(expected, batch)
        for late in (False, True):
            model = triton_sp.wrap(case.model(), config=SPConfig(plan="heads"))
            if late:
                parity.step(model, case.batch("right_pad"))
            change(model)
            if wanted is None:
                with pytest.raises(error):  # type: ignore[arg-type]
                    parity.step(model, batch)
            else:
                found = parity.step(model, batch)
                parity.assert_close(found, wanted, TOLERANCES.get(name, 1e-10))


@pytest.mark.parametrize("names", [list(CHANGES)[::2], list(CHANGES)[1::2]])
def test_changes_after_wrap(ranks, names: list[str]) -> None:
    ranks.run(compare, names, ranks=2)


def train(models: list[Any], batch: tiny.Batch, steps: int) -> None:
    """Steps of each model in turn, with gradients of one while the other runs."""
    optimizers = [torch.optim.SGD(model.parameters(), 0.1 * (1 + i)) for i, model in enumerate(models)]
    for _ in range(steps):
        losses = [model(**batch).loss for model in models]
        for loss in reversed(losses):
            loss.backward()
        for model, optimizer in zip(models, optimizers, strict=True):
            triton_sp.sync_gradients(model)
            optimizer.step()
            optimizer.zero_grad()


def train_alone(model: Any, batch: tiny.Batch, steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_equal_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, own), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-6), name


def two_at_once(copied: bool) -> None:
    """A copy, or a second model, trained beside the first: both are what each is alone."""
    case = zoo.CASES["llava"]
    batch, first = case.batch("right_pad"), triton_sp.wrap(case.model())
    if copied:
        train([first], batch, 1)
    second = copy.deepcopy(first) if copied else triton_sp.wrap(case.model())
    train([first, second], batch, 2)
    start = train_alone(case.model(), batch, 1, 0.1) if copied else case.model()
    for model, rate in ((first, 0.1), (second, 0.2)):
        assert_equal_weights(model, train_alone(copy.deepcopy(start), batch, 2, rate))


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "another model"])
def test_two_models_at_once(ranks, copied: bool) -> None:
    ranks.run(two_at_once, copied, ranks=2)


def groups_come_and_go() -> str:
    """A destroyed group is an error on every rank; with a new one the model goes on."""
    case, everyone = zoo.CASES["llava"], list(range(dist.get_world_size()))
    group: Any = dist.new_group(everyone)
    model, batch = triton_sp.wrap(case.model(), group), case.batch("right_pad")
    train([model], batch, 1)
    dist.destroy_process_group(group)
    with pytest.raises(errors.GroupError) as raised:
        model(**batch)
    triton_sp.unwrap(model)
    train([triton_sp.wrap(model, dist.new_group(everyone))], batch, 2)
    assert_equal_weights(model, train_alone(case.model(), batch, 3, 0.1))
    return raised.value.remedy


def test_groups_come_and_go(ranks) -> None:
    assert all("unwrap" in remedy for remedy in ranks.run(groups_come_and_go, ranks=2))


def freeze_and_thaw() -> None:
    """What trains changes from step to step: what is frozen has no gradient, as in one process."""
    case = zoo.CASES["llava"]
    batch, model, expected = case.batch("right_pad"), triton_sp.wrap(case.model()), case.model()
    for change in (lambda _: None, freeze, thaw_again, lambda model: layers(model)[1].requires_grad_(False)):
        for one in (model, expected):
            one.zero_grad()
            change(one)
        parity.assert_close(parity.step(model, batch), parity.exact_step(expected, batch), 1e-10)
        assert [p.grad is None for p in model.parameters()] == [p.grad is None for p in expected.parameters()]


def test_freeze_and_thaw(ranks) -> None:
    ranks.run(freeze_and_thaw, ranks=2)
