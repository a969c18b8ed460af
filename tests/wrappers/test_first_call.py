"""Models that are accepted by their structure are compared with the unsharded model on the first call: each fault that
reading code or conventions can lead to is injected once, and refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from kit import parity, tiny, zoo
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import triton_sp
from triton_sp.anatomy import find, fusion
from triton_sp.errors import UnsupportedModelError
from triton_sp.ranks import collectives
from triton_sp.testing import RankError
from triton_sp.wrappers.decoders import decoder
from triton_sp.wrappers.fusion import features
from triton_sp.wrappers.inputs import batch as batches
from triton_sp.wrappers.inputs import layout
from triton_sp.wrappers.towers import vision

CONFIG = triton_sp.SPConfig(plan="heads")


@contextmanager
def unknown() -> Iterator[None]:
    """Let no family be proven."""
    with mock.patch.object(find, "PROVEN", set()), mock.patch.object(fusion, "PROVEN_COMPOSITES", set()):
        yield


def other_order(rows: Tensor, *rest: Any) -> Tensor:
    """Features come in another order than their placeholders."""
    return deliver(rows.flip(0), *rest)


def local_positions(arguments: dict[str, Any], call: Any, installation: Any) -> Any:
    """Positions are numbered by a rank's own tokens."""
    call = localise_text(arguments, call, installation)
    arguments["position_ids"] = torch.arange(arguments["position_ids"].shape[-1])[None]
    return call


def levels_of_other_tokens(override: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A module that reads hidden states between blocks is not known to, and its rows are not put in order."""
    rows = override.original(hidden, *args, **kwargs)
    return rows if vision.current(vision.TowerPass) is None else rows.flip(0)


def fails(*args: Any, **kwargs: Any) -> Any:
    raise IndexError("index 7 is out of bounds")


deliver, localise_text = features._deliver, decoder.localise_text
FAULTS: dict[str, tuple[str, str, Any, str, Any, str]] = {
    # fault: case, batch, what is replaced, by what, what the error names
    "features in another order": ("llava", "left_pad", features, "_deliver", other_order, "model"),
    "positions by shard sizes": ("glm4v", "left_pad", find, "_knows_sizes", lambda part: False, "model"),
    "levels of other tokens": ("qwen3_vl", "left_pad", vision, "_run_side_module", levels_of_other_tokens, "layers"),
    "documents see one another": ("qwen2", "packed", batches, "documents_of", lambda *_: None, "model.layers"),
    "local positions": ("llama", "left_pad", decoder, "localise_text", local_positions, "model.layers"),
    "causal where images are not": ("gemma3", "left_pad", layout, "_find_spans", lambda *_: (), "layers"),
    "fails on a shard": ("llama", "plain", decoder, "check_tally", fails, "LlamaForCausalLM"),
}


def call(name: str, batch: str, module: Any = None, attribute: str = "", fault: Any = None) -> None:
    with ExitStack() as stack:
        stack.enter_context(unknown())
        if module is not None:
            stack.enter_context(mock.patch.object(module, attribute, fault))
        model = triton_sp.wrap(zoo.CASES[name].model(), config=CONFIG)
        model(**zoo.CASES[name].batch(batch))


def inject(fault: str) -> None:
    call(*FAULTS[fault][:5])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(ranks, fault: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(inject, fault, ranks=2)
    for error in caught.value.errors.values():
        assert isinstance(error, UnsupportedModelError), error
        assert FAULTS[fault][-1] in error.field and "accepted by its structure" in error.remedy


def count_collectives(name: str, batch: str) -> tuple[list[int], float]:
    """Of three calls, the last of another kind; and the error of a step's gradients after them."""
    case = zoo.CASES[name]
    with unknown():
        model, counts = triton_sp.wrap(case.model(), config=CONFIG), []
    for each in (batch, batch, "no_images"):
        with collectives.record() as ledger:
            model(**case.batch(each))
        counts.append(len(ledger.entries))
    assert all(module.training for module in model.modules())
    expected = parity.step(case.model(), case.batch(batch))
    return counts, parity.gradient_error(parity.step(model, case.batch(batch))[1], expected[1])[0]


def test_only_the_first_call_of_a_kind(ranks) -> None:
    for (first, second, other), error in ranks.run(count_collectives, "qwen3_vl", "left_pad", ranks=2):
        assert first > second and other > second / 3
        assert error < 1e-5


def step_under_fsdp(broken: bool) -> float:
    """A step of a model whose weights are shared out by FSDP 2; the error of its gradients."""
    case = zoo.CASES["qwen3_vl"]
    expected = parity.step(case.model(), case.batch("left_pad"))
    with ExitStack() as stack:
        stack.enter_context(unknown())
        if broken:
            stack.enter_context(mock.patch.object(vision, "_run_side_module", levels_of_other_tokens))
        model = case.model()
        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer)
        model = triton_sp.wrap(fully_shard(model), config=CONFIG)
    loss = tiny.loss_of(model(**case.batch("left_pad")))
    loss.backward()
    grads = {name: x.full_tensor() for name, x in parity.gradients(model).items()}
    assert abs(float(loss / expected[0]) - 1) < 1e-6
    return parity.gradient_error(grads, expected[1])[0]


def test_under_fsdp(ranks) -> None:
    assert max(ranks.run(step_under_fsdp, False, ranks=2)) < 1e-5
    with pytest.raises(RankError) as caught:
        ranks.run(step_under_fsdp, True, ranks=2)
    assert all("hidden states" in error.expected for error in caught.value.errors.values())


def run_alone(broken: bool) -> None:
    with unknown():
        model = triton_sp.wrap(zoo.CASES["vit"].model(), config=CONFIG)

    def flipped(tower: vision.TowerPass, local: Tensor) -> Tensor:
        return leave(tower, local).flip(1) if broken else leave(tower, local)

    with mock.patch.object(vision.TowerPass, "leave", flipped):
        model(**zoo.CASES["vit"].batch("many_images"))


leave = vision.TowerPass.leave


def test_tower_alone(ranks) -> None:
    ranks.run(run_alone, False, ranks=2)
    with pytest.raises(RankError) as caught:
        ranks.run(run_alone, True, ranks=2)
    assert all("outputs of the unsharded model" in error.expected for error in caught.value.errors.values())
