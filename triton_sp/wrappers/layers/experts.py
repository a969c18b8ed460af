"""Experts for which a rank has no token still take part, with a row that counts for nothing.

In one process they would get a gradient, and here they would get none: engines take parameters without one for unused
ones, and wait for them (DDP) or add up other parameters (ZeRO). With the row it is a gradient of zeros.

A rank may have no token at all; experts that loop over those that are chosen do nothing then. Or it has none of a
type: ERNIE 4.5 VL has experts for text and others for images, and most images are longer than a rank's part.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_sp.anatomy.parts import Stack
from triton_sp.wrappers.install import Installation, Override

TYPES = "moe_mm_token_type_ids"  # not 0 where experts for images are used
_NAME = "experts"  # transformers' own, in nearly all of its mixtures
_ROUTED = 3  # arguments of experts: hidden states, and of each token its experts and their weights


def redirect(stack: Stack, installation: Installation) -> None:
    """Override a decoder's experts, and what chooses between them by the type of a token."""
    for module in _experts(stack.module):
        installation.override(module, _run_experts, traced=True)
    for module in _by_type(stack.module):
        installation.override(module, _run_by_type, traced=True)


def _experts(module: nn.Module) -> list[nn.Module]:
    named = [found for name, found in module.named_modules() if name.rpartition(".")[2] == _NAME]
    return [found for found in named if len(_arguments(found)) == _ROUTED]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _by_type(module: nn.Module) -> list[nn.Module]:
    """The innermost modules around experts that are told the types of tokens."""
    inside = [found for child in module.children() for found in _by_type(child)]
    return inside or [module] * (TYPES in _arguments(module) and bool(_experts(module)))


def add_absent_types(arguments: dict[str, Any], whole: Tensor | None) -> None:
    """After a decoder's types of this rank's tokens, one of each type that only other ranks have.

    Args:
        whole: those of the batch.

    >>> arguments = {TYPES: torch.tensor([[1, 1]])}
    >>> add_absent_types(arguments, torch.tensor([[0, 1, 1, 0]]))
    >>> arguments[TYPES]
    tensor([[1, 1, 0]])
    """
    if whole is not None:
        own = arguments[TYPES]
        absent = set(whole.bool().unique().tolist()) - set(own.bool().unique().tolist())
        arguments[TYPES] = torch.cat([own, own.new_tensor([sorted(absent)])], 1)


def _run_by_type(override: Override, hidden_TC: Tensor, types: Tensor | None = None) -> Any:
    """(1, T, C): one more row for each type that `add_absent_types` has added."""
    tokens = hidden_TC.shape[1]
    more = 0 if types is None else types.shape[1] - tokens
    if not more:
        return override.original(hidden_TC, types)
    out, logits = override.original(F.pad(hidden_TC, (0, 0, 0, more)), types)
    return out[:, :tokens], logits[:tokens]


def _run_experts(override: Override, *args: Any, **kwargs: Any) -> Any:
    """(T, C), (T, chosen), (T, chosen): one row if there is none."""
    if any(len(x) for x in (*args, *kwargs.values())):
        return override.original(*args, **kwargs)
    rows, named = [_with_a_row(x) for x in args], {name: _with_a_row(x) for name, x in kwargs.items()}
    return override.original(*rows, **named)[:0]


def _with_a_row(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 1))
