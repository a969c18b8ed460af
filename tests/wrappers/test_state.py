"""Ranks whose models differ, or do different things with them, find out before anything else travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo
from torch import nn

import triton_sp
from triton_sp.errors import DisagreementError
from triton_sp.testing import RankError
from triton_sp.wrappers.inputs import state


def layers(model: Any) -> nn.ModuleList:
    return model.model.language_model.layers


def with_lora(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), model.model.language_model)


def noise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


def drop_a_layer(model: Any) -> None:
    model.model.language_model.layers = layers(model)[:-1]


def tie(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


# What the last rank does to its model before the first step, and the field that the error names.
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other weights": (noise, "values of model.vision_tower"),
    "one other weight": (lambda model: nn.init.ones_(layers(model)[1].mlp.up_proj.weight), "layers.1.mlp.up_proj"),
    "dtype": (lambda model: layers(model)[1].float(), "layers.1.self_attn.q_proj.weight"),
    "frozen tower": (lambda model: freeze(model.model.vision_tower), "model.vision_tower"),
    "frozen norm": (lambda model: freeze(layers(model)[0].input_layernorm), "layers.0.input_layernorm.weight"),
    "everything frozen": (freeze, "model.vision_tower"),
    "an adapter": (with_lora, "model.language_model"),
    "depth": (drop_a_layer, "model.language_model.layers.1"),
    "tied weights": (tie, "lm_head.weight"),
    "checkpointing": (lambda model: model.gradient_checkpointing_enable(), "gradient checkpointing"),
    "training": (lambda model: model.eval(), "training"),
}


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def step(model: nn.Module, batch: tiny.Batch, dtype: torch.dtype | None = None) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**batch).loss
    loss.backward()
    triton_sp.sync_gradients(model)


def run(changes: list[str]) -> dict[str, Any]:
    """What comes of each change on this rank: before the first step, and after one."""
    case, found = zoo.CASES["llava"], {}
    for name in changes:
        for late in (False, True):
            model = triton_sp.wrap(case.model())
            if late:
                step(model, case.batch("plain"))
                model.zero_grad()
            if last():
                CHANGES[name][0](model)
            try:
                step(model, case.batch("plain"))
                found[name, late] = None
            except Exception as error:
                found[name, late] = error
    return found


@pytest.mark.parametrize("changes", [list(CHANGES)[:6], list(CHANGES)[6:]])
def test_models_that_differ(ranks, changes: list[str]) -> None:
    for rank, found in enumerate(ranks.run(run, changes, ranks=2)):
        for (name, late), error in found.items():
            assert isinstance(error, DisagreementError), (name, late, error)
            assert CHANGES[name][1] in error.field and error.rank == rank, (name, late, error)
            assert "rank 1" in error.found, (name, late, error)


def freeze_another(model: Any) -> None:
    freeze(layers(model)[dist.get_rank()].mlp.up_proj)


def ask_for_other_gradients(model: Any, loss: torch.Tensor) -> None:
    wanted = layers(model)[0].mlp.up_proj.weight if last() else model.lm_head.weight
    torch.autograd.grad(loss, [wanted])


def skip_a_backward(model: Any, loss: torch.Tensor) -> None:
    if not last():
        loss.backward()
    model(**zoo.CASES["llava"].batch("plain"))


def skip_a_sync(model: Any, loss: torch.Tensor) -> None:
    loss.backward()
    if not last():
        triton_sp.sync_gradients(model)
    model(**zoo.CASES["llava"].batch("plain"))


def freeze_before_sync(model: Any, loss: torch.Tensor) -> None:
    loss.backward()
    if last():
        freeze(layers(model)[0].mlp)
    triton_sp.sync_gradients(model)


def gradients_of_another_dtype(model: Any, loss: torch.Tensor) -> None:
    loss.backward()
    if last():
        weight = model.lm_head.weight
        weight.grad_dtype = None
        weight.grad = weight.grad.float()
    triton_sp.sync_gradients(model)


STEPS: dict[str, tuple[Callable[[Any, torch.Tensor], None], str]] = {
    "another choice of weights": (ask_for_other_gradients, "exchanges"),
    "a rank skips a backward": (skip_a_backward, "step"),
    "a rank skips sync_gradients": (skip_a_sync, "step"),
    "frozen between backward and sync": (freeze_before_sync, "gradients"),
    "gradients of another dtype": (gradients_of_another_dtype, "gradients"),
}


def run_steps() -> dict[str, Any]:
    case, found = zoo.CASES["llava"], {}
    for name, (go, _) in STEPS.items():
        model = triton_sp.wrap(case.model())
        try:
            go(model, model(**case.batch("plain")).loss)
            found[name] = None
        except Exception as error:
            found[name] = error
    return found


def test_ranks_at_different_steps(ranks) -> None:
    for found in ranks.run(run_steps, ranks=2):
        for name, error in found.items():
            assert isinstance(error, DisagreementError) and error.field == STEPS[name][1], (name, error)


def run_modes(mode: str, what: str) -> None:
    """Settings of check that differ, and autocast on one rank."""
    config = triton_sp.SPConfig(check=mode if last() and what == "check" else "always")
    model = triton_sp.wrap(zoo.CASES["llava"].model(), config=config)
    for _ in range(2):
        step(model, zoo.CASES["llava"].batch("plain"), torch.bfloat16 if last() and what == "autocast" else None)


@pytest.mark.parametrize(("mode", "what"), [("off", "check"), ("first", "check"), ("always", "autocast")])
def test_settings_of_the_check(ranks, mode: str, what: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(run_modes, mode, what, ranks=2)
    fields = {error.field for error in raised.value.errors.values()}
    assert fields == {"config" if what == "check" else "autocast"}


@pytest.mark.parametrize(("part", "missed"), [(0.1, 0.0012), (0.01, 0.53), (1.0, 0.0)])
def test_how_often_a_difference_is_missed(part: float, missed: float) -> None:
    """Where a part of a parameter's values differs: (1 - part)^64, here over 400 drawings of that part."""
    weight = torch.zeros(100, 100)
    places, unnoticed = state._places(weight.shape, weight.device), 0
    for seed in range(400):
        differs = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < part
        unnoticed += not bool(differs[places].any())
    assert abs(unnoticed / 400 - missed) < 0.08


def test_what_is_cached_is_noticed() -> None:
    model: Any = zoo.CASES["llava"].model()
    seen = state.ModelState(model)
    digests = [seen.look()]
    for change in (
        CHANGES[name][0] for name in ("frozen norm", "dtype", "an adapter", "checkpointing", "tied weights")
    ):
        change(model)
        digests.append(seen.look())
        assert digests[-1] == seen.look()  # and nothing else changes it
    assert len(set(digests)) == len(digests)
