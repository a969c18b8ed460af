"""Tiled MLPs: the MLP of each layer works on some tokens at a time, and again in the backward.

An MLP is several times as wide as the hidden states, and keeps three such tensors for the backward. It works token by
token, so tiles give the same; its weights' gradients are added up tile by tile (Arctic Long Sequence Training,
arXiv:2506.13996).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_sp.anatomy.parts import Anatomy
from triton_sp.errors import UnsupportedModelError
from triton_sp.wrappers.install import Installation, Override

_NAMES = ("mlp", "feed_forward")  # what transformers' layers call it


def install(installation: Installation) -> None:
    """Override the MLPs of all layers.

    Raises:
        UnsupportedModelError: no layer has one.
    """
    found = mlps(installation.anatomy)
    if not found:
        raise UnsupportedModelError(
            type(installation.anatomy.entry).__name__,
            expected="layers with an MLP, named mlp or feed_forward, that takes hidden states alone",
            found="none",
            remedy="leave out SPConfig(tiled_mlp=...); mixtures of experts are not tiled",
        )
    for module in found:
        installation.override(module, _run_tiles)


def mlps(anatomy: Anatomy) -> list[nn.Module]:
    """The MLPs of a model's layers: of towers and of the decoder, without mixtures of experts."""
    blocks = [block for stack in anatomy.stacks if stack.by_interface for block in stack.blocks]
    found = [getattr(block, name, None) for block in blocks for name in _NAMES]
    return [module for module in found if module is not None and _is_tiled(module)]


def _is_tiled(module: nn.Module) -> bool:
    takes = inspect.signature(type(module).forward).parameters
    return len(takes) == 2 and not any("expert" in name or "router" in name for name, _ in module.named_modules())


def _run_tiles(override: Override, hidden: Tensor) -> Any:
    """(..., T, C): each tile keeps its input for the backward, and no more."""
    size = override.installation.config.tiled_mlp
    if hidden.shape[-2] <= size:
        return override.original(hidden)
    run = override.original
    if torch.is_grad_enabled():
        run = partial(checkpoint, override.original, use_reentrant=False)
    return torch.cat([run(tile) for tile in hidden.split(size, -2)], -2)
