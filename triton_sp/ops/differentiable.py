"""Functions with a first derivative and no second one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from triton_sp.errors import InputError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function: refuse to be part of a graph of gradients.

    torch's own decorator of this name cuts such a graph where the gradient that comes in needs none, and what depends
    on the saved tensors is then missing from a second derivative without a word.

    Raises:
        InputError: in a backward with `create_graph=True`.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise refused_second_derivative()
        return backward(ctx, *grads)

    return run


def refused_second_derivative() -> InputError:
    """The error about a backward with `create_graph=True`."""
    return InputError(
        "create_graph",
        expected="False: sharded stages have a first derivative only",
        found="True, a backward whose gradients are to be differentiated again",
        remedy="train without gradient penalties, or call triton_sp.unwrap(model)",
    )
