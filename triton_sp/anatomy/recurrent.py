"""Which layers are recurrent, by the functions that their forward calls, and how these are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Signature:
    """How a function that computes a recurrence is called.

    Attributes:
        per_token: the arguments (1, T, heads or groups of heads, ...).
        per_head: the arguments (heads, ...).
        value, key: of the first ones those whose last dimensions are the state's.
        initial, final: the arguments with the state to begin with, and whether the last one is wanted.
        state_space: whether it is a state space model, whose tokens multiply a head's state by a number. Such a state
            is (1, heads, values, keys), that of a delta rule (1, heads, keys, values).
    """

    per_token: tuple[str, ...]
    per_head: tuple[str, ...]
    value: str
    key: str
    initial: str
    final: str
    state_space: bool = False


_DELTA = Signature(
    ("query", "key", "value", "g", "beta"), (), "value", "key", "initial_state", "output_final_state"
)  # fmt: skip
_STATE_SPACE = Signature(
    ("hidden_states", "dt", "B", "C"), ("A", "D", "dt_bias"), "hidden_states", "B", "initial_states",
    "return_final_states", state_space=True,
)  # fmt: skip

# By the names under which transformers' layers call them.
SIGNATURES: Mapping[str, Signature] = {
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba2_chunk_scan": _STATE_SPACE,
}

CONVOLUTION = "causal_conv1d_fn"
FUSED = "mamba2_split_conv1d_scan_combined"  # convolution, recurrence, norm and projection in one; None where it is not


def functions_of(module: nn.Module) -> set[str]:
    """The functions in which tokens meet that a module's own forward calls; empty for all but recurrent layers.

    A layer without a convolution, or with more than one recurrence, is none; nor is one without a recurrence that is
    known, but with parameters of its own, such as a state's decay.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or CONVOLUTION not in code.co_names:
        return set()
    rules = SIGNATURES.keys() & set(code.co_names)
    plain = not rules and not any(True for _ in module.parameters(recurse=False))
    return {CONVOLUTION, *rules} if len(rules) == 1 or plain else set()


def recurrent_layers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The recurrent layers of some blocks that can be sharded, in order."""
    return [module for block in blocks for module in block.modules() if functions_of(module)]
