"""When two layers do the same: their parts, and the arguments that they are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_sp.wrappers.scope import AttentionScope

# Of a layer: its number, which only says where it keeps its keys in a cache, and what has a line of its own.
_NO_FACTS = ("layer_idx", "forward", "_modules", "_parameters", "_buffers")


class Form(NamedTuple):
    """Of a tensor, what is allocated anew."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def new(self) -> Tensor:
        """A tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def form_of(x: Tensor) -> Form:
    """Without the tensor's memory: one on the meta device would be counted as memory too."""
    return Form(x.shape, x.stride(), x.dtype)


def looks(x: Tensor) -> Any:
    """What of a tensor decides how an operation on it is done."""
    return x.shape, x.stride(), x.dtype, x.requires_grad


def kind_of(block: nn.Module) -> Any:
    """What decides what a layer does: two of one kind do the same with the same arguments."""
    facts = []
    for name, module in block.named_modules():
        weights = [
            (key, None if x is None else looks(x)) for key, x in (*module._parameters.items(), *module._buffers.items())
        ]
        plain = [(key, _plain(x)) for key, x in vars(module).items() if key not in _NO_FACTS]
        facts.append((name, type(module), *weights, *plain))
    return tuple(facts)


def _plain(x: Any) -> Any:
    """Numbers and names by value, also inside of others; of anything else the type."""
    if isinstance(x, dict):
        return tuple((key, _plain(value)) for key, value in x.items())
    if isinstance(x, list | tuple | set | frozenset):
        return tuple(map(_plain, x))
    return x if isinstance(x, int | float | str | torch.dtype) else type(x)


def identity(x: Any) -> Any:
    """An argument beside the hidden states, or None if layers could tell one another something by it."""
    if isinstance(x, Tensor):
        return None if x.requires_grad else (x.data_ptr(), *looks(x))
    if isinstance(x, list | tuple):
        parts = tuple(map(identity, x))
        return None if None in parts else parts
    if isinstance(x, AttentionScope):
        return id(x)
    return ("plain", x) if x is None or isinstance(x, int | float | str) else None
