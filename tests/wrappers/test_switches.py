"""Switches that save memory: tiled MLPs and offload compute the same, alone, together and with checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import tiny, zoo
from kit.parity import Plan, heads, hold, set_checkpointing
from promises.memory import Peak

import triton_sp
from triton_sp.anatomy.find import find_parts
from triton_sp.testing import RankError, saved_activations
from triton_sp.wrappers.install import installation_of
from triton_sp.wrappers.layers.tiled_mlp import mlps

PLANS = {
    "qwen2_5_vl": [
        Plan("left_pad", "none", heads(2, tiled_mlp=5, offload=True)),
        Plan("left_pad", "reentrant", heads(2, tiled_mlp=5, offload=True)),
        Plan("image_and_video", "non_reentrant", heads(2, tiled_mlp=3, offload=True)),
    ],
    "llava": [Plan("left_pad", "non_reentrant", heads(2, tiled_mlp=7)), Plan("plain", "none", heads(2, offload=True))],
}


@pytest.mark.parametrize("name", PLANS)
def test_parity(ranks, reference, name: str) -> None:
    hold(ranks, reference, name, PLANS[name], 2)


TOKENS, WIDTH, LAYERS = 512, 96, 4


def held(checkpointing: str, options: dict[str, Any]) -> tuple[int, int, int, str]:
    """Bytes that a rank keeps for the backward, the peak of a step, bytes that went to the CPU, and what is told. The
    MLPs are eight times as wide as hidden states, as those of real models are with their three tensors."""
    config = tiny.text_config("Llama", layers=LAYERS, intermediate_size=8 * WIDTH)
    model = tiny.build("LlamaForCausalLM", config, "sdpa", torch.float32)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    set_checkpointing(model, checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads", trial="off", **options))
    with saved_activations(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
    offloaded = installation_of(model).offloaded
    del loss
    with Peak() as peak:
        model(input_ids=ids, labels=ids).loss.backward()
    return saved[0], peak.bytes, offloaded, triton_sp.explain(model).memory


def test_savings(ranks) -> None:
    """Tiles leave out what is as wide as an MLP; with offload, checkpointed layers keep nothing where they run."""
    both = {"tiled_mlp": 32, "offload": True}
    ways = [("none", {}), ("none", {"tiled_mlp": 32}), ("non_reentrant", {}), ("non_reentrant", both)]
    plain, tiled, checkpointed, all_three = (ranks.run(held, *way, ranks=2)[0] for way in ways)
    states = TOKENS // 2 * WIDTH * 4
    assert plain[0] - tiled[0] >= LAYERS * 3 * 8 * states
    assert checkpointed[2] == plain[2] == 0 and all_three[2] >= LAYERS * states
    assert checkpointed[0] - all_three[0] >= LAYERS * states
    assert all_three[1] - all_three[2] < 0.5 * checkpointed[1], "without what is on the CPU, which is counted here too"
    assert "4 MLPs" in all_three[3] and plain[3] == ""


def refused() -> None:
    triton_sp.wrap(zoo.CASES["opt"].model(), config=triton_sp.SPConfig(tiled_mlp=4))


def test_refused(ranks) -> None:
    """OPT's layers have no module that is their MLP."""
    with pytest.raises(RankError, match="experts are not tiled"):
        ranks.run(refused, ranks=2)


def test_experts_are_not_tiled() -> None:
    model = zoo.CASES["qwen3_vl_moe"].model()
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(module)] for module in mlps(find_parts(model))] == [
        f"model.visual.blocks.{i}.mlp" for i in range(3)
    ]
