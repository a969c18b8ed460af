"""Jobs for adapters and frozen parts: a step of the wrapped model, against the same model in one process."""

from __future__ import annotations

import copy

import torch
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.testing import relative_error


def compare(reference: nn.Module, model: nn.Module, batch: tiny.Batch, autocast: bool = False) -> float:
    """The worse of the loss's and the gradients' relative errors."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (expected, gradients), (loss, found) = parity.step(reference, batch), parity.step(model, batch)
    return max(parity.gradient_error(found, gradients)[0], relative_error(loss, expected))


FROZEN = {
    "tower": ("vision_tower", "visual"),
    "projector": ("multi_modal_projector", "merger"),
    "decoder": ("language_model", "lm_head"),
    "all but the projector": ("vision_tower", "language_model", "lm_head"),
    "all but the tower": ("multi_modal_projector", "language_model", "lm_head"),
}


def frozen(name: str, what: str, checkpointing: str = "none", autocast: bool = False) -> float:
    """With some parts that don't learn: ranks still wait in the backward for what goes through them."""
    case = zoo.CASES[name]
    dtype = torch.float32 if autocast else case.dtype
    reference, batch = case.model(dtype), case.batch(dtype=dtype)
    for path, parameter in reference.named_parameters():
        if what != "nothing" and any(part in path for part in FROZEN[what]):
            parameter.requires_grad_(False)
    model = copy.deepcopy(reference)
    parity.set_checkpointing(model, checkpointing)
    return compare(reference, triton_sp.wrap(model), batch, autocast)


def lora(name: str, order: str, checkpointing: str, targets: str) -> float:
    """LoRA from PEFT, put on before wrap, or after it."""
    from peft import LoraConfig, get_peft_model

    case = zoo.CASES[name]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    batch = case.batch("left_pad")
    torch.manual_seed(1)
    reference = get_peft_model(case.model(), config).to(case.dtype)
    model = case.model()
    parity.set_checkpointing(model, checkpointing)
    if order == "wrap_first":
        triton_sp.wrap(model)
    model = get_peft_model(model, config).to(case.dtype)
    if order == "peft_first":
        triton_sp.wrap(model)
    model.load_state_dict(reference.state_dict())
    assert triton_sp.explain(model).rows, "found inside"
    ran = [row.last_batch for row in triton_sp.explain(model).rows]
    assert not any(ran)
    error = compare(reference, model, batch)
    assert any(row.last_batch for row in triton_sp.explain(model).rows), "ran without being sharded"
    return error
