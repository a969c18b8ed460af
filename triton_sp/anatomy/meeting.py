"""In which layers of a block tokens may meet: all but those that are known to work token by token.

Where such a layer's attention cannot be exchanged, it runs on gathered hidden states (wrappers/decoders/gathered.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from triton_sp.anatomy.parts import Stack, attention_like, calls_attention_interface, contains, is_hf
from triton_sp.anatomy.refusals import is_token_wise, refuse_stochastic_depth


def gather_instead(stack: Stack, entry: nn.Module, names: dict[int, str]) -> None:
    """Let the layers of a refused decoder in which tokens may meet run on gathered hidden states, if it has others."""
    refusal = stack.refusal
    assert refusal is not None
    modules = [module for block in stack.blocks for module in block.modules()]
    dropping = next((module for module in modules if getattr(module, "drop_prob", 0)), None)
    by_block = [list(_layers(block)) for block in stack.blocks]
    if dropping is not None:
        stack.refusal = refuse_stochastic_depth(names.get(id(dropping), type(dropping).__name__), dropping)
    elif all(by_block) and takes_tokens(stack.module) and _predicts(entry, stack):
        stack.gathered = [layer for layers in by_block for layer in layers]
        stack.why_gathered = f"{refusal.field}: {refusal.found}"
        stack.refusal, stack.proven = None, False
        stack.attention, stack.recurrent, stack.spans = [], [], None


def _predicts(entry: nn.Module, stack: Stack) -> bool:
    """Whether a model is a decoder with a head; what has none may pool tokens."""
    if getattr(getattr(entry, "config", None), "is_encoder_decoder", False):
        return False
    around: list[Any] = [module for module in entry.modules() if is_hf(module) and contains(module, stack.module)]
    return any(module.get_output_embeddings() is not None for module in around)


def takes_tokens(owner: nn.Module) -> bool:
    """Whether a model reads token ids, or their embeddings."""
    taken = inspect.signature(type(owner).forward).parameters
    return is_hf(owner) and ("input_ids" in taken or "inputs_embeds" in taken)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that a block calls and in which tokens may meet."""
    for child in module.children():
        if all(_works_token_wise(part) for part in child.modules()):
            continue
        if isinstance(child, nn.ModuleList):  # it is not called itself
            yield from _layers(child)
        else:
            yield child


def _works_token_wise(module: nn.Module) -> bool:
    if attention_like(module) or calls_attention_interface(module):
        return False
    return any(True for _ in module.children()) or is_token_wise(module)
