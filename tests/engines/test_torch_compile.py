"""A wrapped model under torch.compile: the same loss and gradients, and no graph break for each layer of a decoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import nn
from torch._dynamo.utils import counters

from triton_sp import SPConfig, wrap
from triton_sp.testing import RankError

# Inductor has rounding of its own in what a model does in float32.
TOLERANCE = {"eager": 1e-12, "aot_eager": 1e-10, "inductor": 1e-5}


def deeper(case: tiny.Case, part: str, layers: int) -> tiny.Case:
    """A case with more layers in a part of its configuration."""
    assert isinstance(case.build, partial)
    name, config, *rest = case.build.args
    config = copy.deepcopy(config)
    stack = getattr(config, part) if part else config
    depth = "depth" if hasattr(stack, "depth") else "num_hidden_layers"
    setattr(stack, depth, getattr(stack, depth) + layers)
    return replace(case, build=partial(case.build.func, name, config, *rest))


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for layers in model.modules() if isinstance(layers, nn.ModuleList) for layer in layers]


def compare(name: str, batch: str, how: str, backend: str, config: SPConfig) -> tuple[int, int]:
    """A step with and without torch.compile; how many graph breaks there were, and graphs."""
    case = zoo.CASES[name]
    plain, compiled = wrap(case.model(), config=config), wrap(case.model(), config=config)
    expected = parity.step(plain, case.batch(batch))
    torch._dynamo.reset()
    for module in layers_of(compiled) if how == "layers" else [compiled]:
        module.compile(backend=backend)
    counters.clear()
    found = parity.step(compiled, case.batch(batch))
    assert abs(float(found[0] / expected[0]) - 1) <= max(TOLERANCE[backend], 1e-12)
    assert parity.gradient_error(found[1], expected[1])[0] <= TOLERANCE[backend]
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def breaks_by_layer(name: str, part: str) -> float:
    """How many breaks a layer more adds to a model that is compiled as a whole."""
    counts = []
    for more in (0, 2):
        case = deeper(zoo.CASES[name], part, more)
        model = wrap(case.model(), config=SPConfig(plan="heads"))
        torch._dynamo.reset()
        model.compile(backend="eager")
        counters.clear()
        tiny.loss_of(model(**case.batch())).backward()
        counts.append(sum(counters["graph_break"].values()))
    return (counts[1] - counts[0]) / 2


pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("plan", ["heads", "segments"])
def test_layers_of_a_decoder(ranks, backend: str, plan: str) -> None:
    """Each is one graph, with an exchange of heads in it or without, and all layers have the same."""
    for found in ranks.run(compare, "llama", "left_pad", "layers", backend, SPConfig(plan=plan), ranks=2, timeout=600):
        assert found == (0, 1)


@pytest.mark.parametrize(
    ("name", "batch", "backend"),
    [
        ("llama", "packed", "inductor"),
        ("llava", "left_pad", "inductor"),
        ("qwen2_5_vl", "image_and_video", "aot_eager"),
    ],
)
def test_whole_models(ranks, name: str, batch: str, backend: str) -> None:
    for _, graphs in ranks.run(compare, name, batch, "whole", backend, SPConfig(plan="heads"), ranks=2, timeout=600):
        assert graphs > 0


@pytest.mark.parametrize(
    ("name", "part", "most"), [("llama", "", 0), ("llava", "text_config", 0), ("llava", "vision_config", 1)]
)
def test_breaks_by_layer(ranks, name: str, part: str, most: int) -> None:
    assert max(ranks.run(breaks_by_layer, name, part, ranks=2, timeout=600)) <= most


def compile_on_rank_0() -> float:
    """Rank 1 runs what both were told to compile as it is, as where torch gives up compiling."""
    case = zoo.CASES["llama"]
    model = wrap(case.model(), config=SPConfig(plan="heads"))
    for layer in layers_of(model):
        layer.compile(backend="eager")
    with torch.compiler.set_stance("force_eager" if dist.get_rank() else "default"):
        found = parity.step(model, case.batch("plain"))
    return parity.gradient_error(found[1], parity.step(wrap(case.model()), case.batch("plain"))[1])[0]


def test_a_rank_that_does_not_compile(ranks) -> None:
    assert max(ranks.run(compile_on_rank_0, ranks=2)) < 1e-10


def offload_what_layers_save() -> None:
    """A hook that replaces each saved tensor by a copy."""
    model = wrap(zoo.CASES["llama"].model(), config=SPConfig(plan="heads"))
    for layer in layers_of(model):
        layer.compile(backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = tiny.loss_of(model(**zoo.CASES["llama"].batch("plain")))
    loss.backward()


def test_copies_of_saved_tensors(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(offload_what_layers_save, ranks=2)
    assert any(getattr(error, "field", "") == "torch.compile" for error in raised.value.errors.values())


def verify_compiled_layers() -> None:
    model = wrap(zoo.CASES["llama"].model(), config=SPConfig(verify=1, trial="off"))
    for layer in layers_of(model):
        layer.compile(backend="eager")
    model(**zoo.CASES["llama"].batch("plain"))


def test_verification_is_not_left_out_in_silence(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(verify_compiled_layers, ranks=2)
    assert {getattr(error, "field", "") for error in raised.value.errors.values()} == {"SPConfig.verify"}
