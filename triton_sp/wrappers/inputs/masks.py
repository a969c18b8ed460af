"""What a model's own masks say, asked of the model: its decoder is run on nothing, up to where it makes its mask.

transformers' models describe a mask by a function of a row and a column, which they hand to what is registered for
their attention implementation. Ours looks at that function beside the diagonal, which is enough to tell where packed
documents begin, and ends the run. Nothing of size (S, S) is made, and no layer runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.wrappers.install import replaced

CHUNKED = "chunked_attention"  # the type of such layers in configurations
_LOOK = "triton_sp_look"  # the implementation whose masks are looked at

# mask(row of the batch, head, token that sees, token that is seen) -> whether it does, for tensors that broadcast.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Found(Exception):
    """Ends the run of a decoder with the function that describes its mask."""

    def __init__(self, function: MaskFunction) -> None:
        self.function = function


def _found(*_: Any, mask_function: MaskFunction, **__: Any) -> None:
    raise _Found(mask_function)


def _found_chunks(*_: Any, mask_function: MaskFunction, local_size: int | None = None, **__: Any) -> None:
    """Before 5.17 Llama 4 makes masks that no layer has, too; those of chunks come with their size."""
    if local_size is not None:
        raise _Found(mask_function)


def mask_function_of(
    decoder: nn.Module, shape: tuple[int, int], layer_type: str | None = None, **arguments: Any
) -> MaskFunction | None:
    """The function by which a decoder describes the mask of a batch; None if it makes it otherwise.

    Args:
        shape: (B, S) of the batch.
        layer_type: the layers whose mask it is, where types have different ones.
        arguments: what else its forward gets: position_ids, an attention_mask (B, S).
    """
    try:
        from transformers import AttentionMaskInterface
    except ImportError:
        return None
    AttentionMaskInterface.register(_LOOK, _found_chunks if layer_type == CHUNKED else _found)
    module: Any = decoder
    config, like = module.config, next(module.parameters())
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = _LOOK
    if layer_type is not None:
        module.config.layer_types = [layer_type] * len(config.layer_types)
    states = like.new_zeros(1, 1, 1).expand(*shape, config.hidden_size)
    try:
        # Gemma 3n and 4 make inputs for each layer before their masks, of ids that they aren't given here.
        layered = {"hidden_size_per_layer_input": 0, "project_per_layer_inputs": lambda *_: None}
        with torch.no_grad(), ExitStack() as stack:
            for name, value in layered.items():
                stack.enter_context(replaced(module, name, value))
            type(module).forward(module, inputs_embeds=states, use_cache=False, **arguments)
    except _Found as found:
        return found.function
    except Exception:  # a model of anybody's, on nothing: whatever it raises, it has not said
        return None
    finally:
        module.config = config
    return None


def documents_of(decoder: nn.Module, arguments: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """(B, S) bool on the CPU, where the decoder's mask begins a packed document; None if position_ids begin none.

    Raises:
        InputError: they may, and the decoder's mask does not tell.
    """
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None:
        return None  # with a mask transformers takes no positions for packing
    rows = positions[0] if positions.ndim == 3 else positions
    if bool((rows.diff(dim=-1) == 1).all()):
        return None
    plain = "full_attention" if _has_chunks(decoder) else None
    function = mask_function_of(decoder, shape, plain, position_ids=positions, attention_mask=None)
    if function is None:
        raise InputError(
            "position_ids",
            expected="positions that increase by 1, or a decoder whose mask shows where documents begin",
            found=f"a {type(decoder).__name__}, which makes its mask in another way than transformers' models",
            remedy="give an attention_mask and one document a row",
        )
    return _begins(function, shape, positions.device)


def chunks_of(decoder: nn.Module, arguments: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """(B, S) bool on the CPU, where the decoder's mask begins a chunk, of attention in chunks; None if it has none.

    Raises:
        UnsupportedModelError: its mask does not tell.
    """
    if not _has_chunks(decoder):
        return None
    given = {name: arguments.get(name) for name in ("position_ids", "attention_mask")}
    function = mask_function_of(decoder, shape, CHUNKED, **given)
    if function is None:
        raise UnsupportedModelError(
            type(decoder).__name__,
            expected="a decoder that tells where the chunks of its attention begin",
            found="one that makes its mask in another way than transformers' models",
            remedy="use a model whose masks transformers makes",
        )
    return _begins(function, shape, next(decoder.parameters()).device)


def _has_chunks(decoder: nn.Module) -> bool:
    return CHUNKED in (getattr(decoder.config, "layer_types", None) or ())


def _begins(function: MaskFunction, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(B, S) bool on the CPU, the tokens that do not see the one before."""
    batch, token = (torch.arange(size, device=device) for size in shape)
    seen = function(batch[:, None], token.new_zeros(()), token[None, 1:], token[None, :-1])
    return torch.nn.functional.pad(~seen.expand(shape[0], -1), (1, 0), value=True).cpu()
