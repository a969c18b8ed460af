"""The plan of a stack for one batch: what the cost model needs, read off the stack and its configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_sp.anatomy.families import layer_config
from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.ops.backends.choice import Choice
from triton_sp.plan.cost import Layers, PlanChoice, choose_plan, find_link
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.install import Installation


def plan_stack(
    stack: Stack,
    config: SPConfig,
    group: Group,
    segments: Segments,
    like: Tensor,
    *,
    causal: bool = False,
    owned: Shards | None = None,
) -> PlanChoice:
    """The plan of a stack whose first block attends in `segments`. The same on every rank.

    Args:
        like: a tensor with the channels (its last dimension), dtype and device of the hidden states.
        causal: whether the stack is a decoder, which is never replicated: each token's loss is one rank's.
        owned: the tokens of each rank's own images, where the ranks have shared images out.
    """
    layers = layers_of(stack, like.shape[-1], like.dtype, causal)
    link = find_link(config.link, like.device.type, group.size)
    # A plain module is tried out on shards in its first call, so it must have shards.
    replicable = stack.by_interface and owned is None and not causal
    choice = choose_plan(segments, group.size, stack.unit, layers, link, config.plan, replicable, owned)
    attention = None if config.attention == "triton" else Choice(config.attention)
    return replace(choice, chunks=config.chunks, attention=attention)


def plan_decoder(installation: Installation, device: torch.device, segments: Segments) -> PlanChoice:
    """The plan of the decoder for a batch on `device` whose rows and documents are `segments`."""
    stack = installation.anatomy.decoder
    assert stack is not None
    model_config: Any = stack.module.config
    dtype = next(stack.module.parameters()).dtype
    like = torch.empty(0, model_config.hidden_size, dtype=dtype, device=device)
    return plan_stack(stack, installation.config, installation.group, segments, like, causal=True)


def layers_of(stack: Stack, width: int, dtype: torch.dtype, causal: bool) -> Layers:
    """A stack as the cost model sees it; heads as its configuration has them, or of 64 channels."""
    config = layer_config(stack.attention[0]) if stack.attention else None
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or max(width // 64, 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    return Layers(len(stack.blocks), width, heads * head_dim, kv_heads * head_dim, head_dim, dtype.itemsize, causal)
