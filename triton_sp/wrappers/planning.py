"""The plan of a stack for one batch: what the cost model needs, read off the stack and its configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.plan.cost import Layers, PlanChoice, choose_plan, find_link
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.install import Installation


def plan_tower(
    stack: Stack, config: SPConfig, group: Group, segments: Segments, hidden: Tensor, owned: Shards | None = None
) -> PlanChoice:
    """The plan of a vision tower whose first block attends in `segments`. The same on every rank.

    Args:
        hidden: what the first block gets, or an empty tensor (0, C) like it.
        owned: the tokens of each rank's own images, where ranks have shared them out.
    """
    layers = layers_of(stack, hidden.shape[-1], hidden.dtype, causal=False)
    link = find_link(config.link, hidden.device.type, group.size)
    # A plain module is tried out on shards at its first call, so it must have some.
    replicable = stack.by_interface and owned is None
    choice = choose_plan(segments, group.size, stack.unit, layers, link, config.plan, replicable, owned)
    return replace(choice, chunks=config.chunks)


def plan_decoder(installation: Installation, device: torch.device, segments: Segments) -> PlanChoice:
    """The plan of the decoder, which is never replicated: each token's loss is one rank's."""
    stack, group, config = installation.anatomy.decoder, installation.group, installation.config
    assert stack is not None
    model_config: Any = stack.module.config
    dtype = next(stack.module.parameters()).dtype
    layers = layers_of(stack, model_config.hidden_size, dtype, causal=True)
    link = find_link(config.link, device.type, group.size)
    choice = choose_plan(segments, group.size, 1, layers, link, config.plan, replicable=False)
    return replace(choice, chunks=config.chunks)


def layers_of(stack: Stack, width: int, dtype: torch.dtype, causal: bool) -> Layers:
    """A stack as the cost model sees it; heads as its configuration has them, or of 64 channels."""
    config: Any = getattr(stack.attention[0], "config", None) if stack.attention else None
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or max(width // 64, 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    return Layers(len(stack.blocks), width, heads * head_dim, kv_heads * head_dim, head_dim, dtype.itemsize, causal)
