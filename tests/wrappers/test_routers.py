"""The auxiliary loss of mixtures of experts, set in the configuration or in the call, is that of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.testing import relative_error

COEFFICIENT = 0.1
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(**options: Any) -> nn.Module:
    config = tiny.text_config("Mixtral", sliding_window=None, router_aux_loss_coef=COEFFICIENT, **EXPERTS, **options)
    return tiny.build("MixtralForCausalLM", config, "sdpa", torch.float32)


def vision_and_language(**options: Any) -> nn.Module:
    model = zoo.CASES["qwen3_vl_moe"].build(torch.float32)
    text: Any = model.config.text_config
    text.router_aux_loss_coef = COEFFICIENT
    for name, value in options.items():
        setattr(text, name, value)
    return model


BUILD = {"mixtral": mixtral, "qwen3_vl_moe": vision_and_language}


def compare(name: str, batch_name: str, in_config: bool, chunked: bool, gradient: str) -> tuple[float, float, float]:
    """Errors of the loss, the auxiliary loss and the worst gradient."""
    recipe = zoo.CASES["llama" if name == "mixtral" else name].batches[batch_name]
    options = {"output_router_logits": True} if in_config else {}
    call = {} if in_config else {"output_router_logits": True}
    results = []
    for wrapped in (False, True):
        model = BUILD[name](**options)
        if wrapped:
            triton_sp.wrap(model, config=triton_sp.SPConfig(gradient=gradient, plan="heads", chunked_loss=chunked))
        out = model(**recipe(torch.float32), **call)
        out.loss.backward()
        if wrapped:
            triton_sp.sync_gradients(model)
        results.append((out.loss.detach(), out.aux_loss.detach(), parity.gradients(model)))
    (loss, auxiliary, grads), (our_loss, our_auxiliary, our_grads) = results
    return (
        relative_error(our_loss, loss),
        relative_error(our_auxiliary, auxiliary),
        parity.gradient_error(our_grads, grads)[0],
    )


@pytest.mark.parametrize(
    ("name", "batch", "in_config", "chunked", "size"),
    [
        ("mixtral", "plain", True, False, 3),
        ("mixtral", "packed", True, True, 2),
        ("mixtral", "left_pad", False, False, 2),
        ("qwen3_vl_moe", "right_pad", True, False, 2),
    ],
)
def test_auxiliary_loss(ranks, name: str, batch: str, in_config: bool, chunked: bool, size: int) -> None:
    gradient = "sum" if size == 3 else "mean"
    for loss, auxiliary, grads in ranks.run(compare, name, batch, in_config, chunked, gradient, ranks=size):
        assert loss < 1e-6 and auxiliary < 1e-6 and grads < 1e-5, (loss, auxiliary, grads)
