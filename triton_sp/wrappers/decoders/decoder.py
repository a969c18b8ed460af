"""The decoder, or the composite model around it, sees this rank's part of the stream of tokens (see layout.py).

Positions are computed for the whole batch and then selected, so a token keeps the position that it has in one process.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.families import TOKEN_TYPES, first_positions
from triton_sp.anatomy.parts import Stack, hands_keywords_on, takes_positions
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.wrappers.decoders import cross
from triton_sp.wrappers.inputs.layout import UNTOUCHED, TextCall
from triton_sp.wrappers.install import Installation, LastCall, Override
from triton_sp.wrappers.layers import experts, recurrent
from triton_sp.wrappers.layers.attention import redirect
from triton_sp.wrappers.layers.offload import kept_on_cpu
from triton_sp.wrappers.scope import (
    KEYWORD,
    AttentionScope,
    active,
    bound_checkpoints,
    check_tally,
    current,
    refuse_lost_scope,
)


def install(stack: Stack, installation: Installation) -> None:
    """Override a decoder's forward, its attention, its recurrent layers, its experts, and what makes positions."""
    redirect(stack.attention, installation)
    recurrent.redirect(stack.recurrent, installation)
    experts.redirect(stack, installation)
    install_positions(stack, installation)
    installation.override(stack.module, partial(_run_decoder, _not_told(stack)))


def install_positions(stack: Stack, installation: Installation) -> None:
    """Override rotary embeddings that look at the longest position, and a table of positions."""
    for rotary in stack.rotaries:
        installation.override(rotary, _run_rotary)
    if stack.learned_positions is not None:
        installation.override(stack.learned_positions, _run_positions)


def _not_told(stack: Stack) -> tuple[nn.Module, ...]:
    """The attention and recurrent layers, if not all modules around them hand keywords on to them."""
    layers = [*stack.attention, *stack.recurrent]
    inside = {id(layer) for layer in layers}
    around = [m for m in stack.module.modules() if any(id(part) in inside for part in m.modules())]
    around = [m for m in around if not isinstance(m, nn.ModuleList)]
    return () if all(map(hands_keywords_on, around)) else tuple(layers)


def _run_decoder(not_told: tuple[nn.Module, ...], override: Override, *args: Any, **kwargs: Any) -> Any:
    call = current(TextCall)
    if call is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    installation = override.installation
    stack = installation.anatomy.decoder
    assert stack is not None
    arguments = override.bind(args, kwargs)
    if call.longest is None:
        call = localise_text(arguments, call, installation)
    else:
        expect_mask(arguments.get("attention_mask"), call, stack)
        if arguments.get("position_ids") is None:
            arguments["position_ids"] = call.positions
    arguments["attention_mask"] = UNTOUCHED.to(call.index.device)
    arguments[KEYWORD] = scope = AttentionScope(
        *(call.stream, call.tally),
        causal=True if stack.spans else None,
        by_layer_type=call.by_layer_type,
        attention=not_told,
        decoder=True,
        index=call.local_index % call.shape[1],
        proof=installation.proof,
        forward=installation.forwards,
    ).traceable()
    if call.records_routers:
        arguments["output_router_logits"] = True
    told = active(replace(call, attention=scope)) if not_told else active(call)
    with told, bound_checkpoints(stack.module) if not_told else nullcontext(), kept_on_cpu(installation):
        out = override.original(**arguments)
    check_tally(call.tally, len(stack.attention), stack.name)
    check_tally(call.tally, len(stack.recurrent), stack.name, "recurrent")
    check_tally(call.tally, stack.learned_positions is not None, stack.name, "position embedding")
    methods = [f"recurrent layers by {method}" for method in sorted(scope.methods)]
    installation.last_calls[stack.name] = LastCall(call.choice, (call.stream.describe(), *methods))
    return out


def expect_mask(mask: Any, call: TextCall, stack: Stack) -> None:
    """Raise an UnsupportedModelError if the model around the decoder has made a mask of its own."""
    if isinstance(mask, dict) and all(part is call.mask for part in mask.values()):  # a mask for each type of layer
        return
    if mask is None or mask is call.mask or _masks_nothing(mask, call):
        return
    if call.mask is None or not isinstance(mask, Tensor) or not torch.equal(mask.bool(), call.mask.bool()):
        raise UnsupportedModelError(
            stack.name,
            expected="the attention_mask of the batch",
            found="a mask that the composite model made itself",
            remedy="this family is not handled yet",
        )


def _masks_nothing(mask: Any, call: TextCall) -> bool:
    """Whether it is the mask of ones that some composites make for tokens that come without (BLIP-2)."""
    return isinstance(mask, Tensor) and mask.shape == (1, len(call.local_index)) and bool(mask.all())


_PER_TOKEN = (*TOKEN_TYPES, "per_layer_inputs")
_ON_THEIR_OWN = ("attention_mask", "position_ids", "visual_pos_masks", "image_embeds_position_mask", *cross.NAMES)
_HANDLED = ("input_ids", "inputs_embeds", *_PER_TOKEN, *_ON_THEIR_OWN)


def localise_text(arguments: dict[str, Any], call: TextCall, installation: Installation) -> TextCall:
    """Replace the inputs of a decoder, or of the composite model around it, by those of this rank's tokens.

    Returns:
        The call, which knows then that this has been done.
    """
    stack, index, (rows, length) = installation.anatomy.decoder, call.local_index, call.shape
    ids, whole_types = arguments.get("input_ids"), arguments.get(experts.TYPES)
    assert stack is not None
    for name in ("input_ids", "inputs_embeds", *_PER_TOKEN):
        value = arguments.get(name)
        if value is not None:
            if tuple(value.shape[:2]) != (rows, length):
                raise InputError(
                    name,
                    expected=f"{(rows, length)} tokens, as the batch has",
                    found=f"{tuple(value.shape[:2])} in the decoder",
                    remedy="this model changes the sequence between its input and its decoder, and cannot be sharded",
                )
            arguments[name] = value.flatten(0, 1)[index][None]
    experts.add_absent_types(arguments, whole_types)
    given_mask = arguments.get("attention_mask")
    if not stack.gathered:
        expect_mask(given_mask, call, stack)
    # Padding is left out; a model around the decoder that makes a mask nevertheless is noticed by that.
    arguments["attention_mask"] = mask = call.mask if stack.spans else None

    positions = arguments.get("position_ids")
    if positions is None:
        positions = first_positions(stack, ids, given_mask, length, index.device)
    longest = positions.max()
    whole = {"attention_mask": given_mask, "position_ids": positions}
    positions = positions.expand(*positions.shape[:-2], rows, length).flatten(-2)
    local = positions[..., None, index]
    arguments |= {"position_ids": local} if takes_positions(stack.module) else {}
    arguments.pop("cache_position", None)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
        arguments.pop(name, None)
    _localise_deepstack(arguments, index)
    _localise_image_embeds(arguments, index)
    cross.localise(arguments, call)
    fusion = installation.anatomy.fusion
    handled = {*_HANDLED, *(fusion.visual_arguments if fusion else ())}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in handled and length in value.shape:
            raise UnsupportedModelError(
                stack.name,
                expected="inputs that are known to be per token",
                found=f"{name} of shape {tuple(value.shape)}",
                remedy="leave it out; it is not handled yet",
            )
    return replace(call, positions=local, longest=longest, mask=mask, whole=whole)


def _localise_deepstack(arguments: dict[str, Any], index: Tensor) -> None:
    """Qwen3-VL adds visual features of several depths in the first layers: keep the rows of this rank's tokens."""
    mask = arguments.get("visual_pos_masks")
    if mask is None:
        return
    flat = mask.flatten()
    local = flat[index]
    rows = (flat.cumsum(0) - 1)[index][local]
    arguments["visual_pos_masks"] = local[None]
    if arguments.get("deepstack_visual_embeds") is not None:
        arguments["deepstack_visual_embeds"] = [
            level.index_select(0, rows) for level in arguments["deepstack_visual_embeds"]
        ]


def _localise_image_embeds(arguments: dict[str, Any], index: Tensor) -> None:
    """Kosmos-2's text model puts features among its text itself: keep the rows of this rank's tokens."""
    mask, features = arguments.get("image_embeds_position_mask"), arguments.get("image_embeds")
    if mask is None or features is None:
        return
    flat = mask.flatten().bool()
    local = flat[index]
    arguments["image_embeds_position_mask"] = local[None]
    arguments["image_embeds"] = features.flatten(0, 1)[(flat.cumsum(0) - 1)[index][local]]


def _run_rotary(override: Override, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Long-context frequencies depend on the longest position of the batch, which may be another rank's: add it."""
    call = current(TextCall)
    if call is None or call.longest is None:
        return override.original(x, position_ids, *args, **kwargs)
    extra = call.longest.expand(*position_ids.shape[:-1], 1).to(position_ids.dtype)
    tables = override.original(x, torch.cat([position_ids, extra], -1), *args, **kwargs)
    return tuple(table[..., :-1, :] for table in tables)


def _run_positions(override: Override, *args: Any, **kwargs: Any) -> Any:
    """A table of learned positions: seen to be looked up by the positions that tokens have in the batch. A decoder that
    is not told positions numbers its tokens, and hands that to the table."""
    call = current(TextCall)
    if call is None or call.positions is None:
        return override.original(*args, **kwargs)
    stack = override.installation.anatomy.decoder
    if stack is not None and not takes_positions(stack.module):
        arguments = override.bind(args, kwargs)
        given = arguments.get("position_ids")  # or the table numbers them itself, a row (MVP)
        arguments["position_ids"] = call.positions.reshape((-1,) if given is None else given.shape)
        args, kwargs = (), arguments
    memory = (call.positions.data_ptr(), call.positions.numel())
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    call.tally["position embedding"] += any((x.data_ptr(), x.numel()) == memory for x in tensors)
    return override.original(*args, **kwargs)
