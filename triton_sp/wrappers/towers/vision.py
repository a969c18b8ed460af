"""Vision towers: cut before the first block, put together after the last.

A tower's own forward runs on every rank. Its first block takes the rank's shard of the patches of the whole batch (a
CLS token is a token like another), every block runs on that shard, and after the last block tokens are where they were
before: see placement.py. What a tower reads from between its blocks (DeepStack's mergers, LLaVA's second to last
hidden state) is brought there when it is read.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.families import cu_seqlens_of_joined_images, joins_images
from triton_sp.anatomy.parts import Stack
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.install import Installation, LastCall, Override
from triton_sp.wrappers.layers.attention import redirect
from triton_sp.wrappers.layers.offload import kept_on_cpu
from triton_sp.wrappers.plain import opaque
from triton_sp.wrappers.plain.sdpa import no_fast_path
from triton_sp.wrappers.scope import (
    Call,
    active,
    bound_checkpoints,
    check_tally,
    current,
    recomputing,
    refuse_lost_scope,
)
from triton_sp.wrappers.towers.patches import Patches
from triton_sp.wrappers.towers.placement import Replicated
from triton_sp.wrappers.towers.tower import TowerPass, TowerStates, without_dense_mask


def install(stack: Stack, installation: Installation) -> None:
    """Override a tower's forward, its blocks, its side_modules and its attention."""
    if stack.by_interface:
        redirect(stack.attention, installation)
    else:
        for attention in stack.attention:
            if attention not in stack.blocks:
                installation.override(attention, opaque.run_attention_module)
    for block in stack.blocks:
        inside = set(block.modules())
        attention = [module for module in stack.attention if stack.by_interface and module in inside]
        installation.override(block, partial(_run_block, attention))
    for part in stack.outside:
        if part is not stack.embeddings:
            installation.override(part, _run_outside)
    for module in stack.side_modules:
        installation.override(module, _run_side_module)
    if stack.embeddings is not None:
        installation.override(stack.embeddings, _run_embeddings)
    installation.override(stack.module, _run_tower)


def _stack_of(override: Override) -> Stack:
    module = override.module
    towers = override.installation.anatomy.towers
    return next(t for t in towers if t.module is module or any(m is module for m in (*t.blocks, *t.side_modules)))


def _run_embeddings(override: Override, hidden: Tensor, lengths: Tensor, shapes: Tensor, *places: Tensor) -> Tensor:
    """GLM-4V interpolates positions by the sizes of the frames that patches belong to. Where this rank has a shard of
    the patches, it gets the sizes of its frames."""
    tower = current(TowerPass)
    if tower is not None and isinstance(tower.placement, Patches):
        lengths, shapes = (table.to(hidden.device) for table in tower.placement.frames)
    if not len(hidden):  # nothing can be interpolated, but the weight must have its gradient
        module: Any = override.module
        return hidden + module.position_embedding.weight[:0]
    return override.original(hidden, lengths, shapes, *places)


def _run_tower(override: Override, *args: Any, **kwargs: Any) -> Any:
    call = current(Call)
    if call is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    installation, stack = override.installation, _stack_of(override)
    # A copy: what is planned in one call of a tower is not another's.
    placement = replace(call.placement or Replicated(installation.group))
    tower = TowerPass(stack, installation.config, placement, proof=installation.proof, forward=installation.forwards)
    if joins_images(stack):
        tower.joined = cu_seqlens_of_joined_images(stack, override.bind(args, kwargs))
    guard = without_dense_mask(tower) if stack.by_interface else no_fast_path()
    with active(tower), bound_checkpoints(stack.module), guard, kept_on_cpu(installation):
        out = override.original(*args, **{**kwargs, **placement.arguments})
    tower.last_output = None
    tower.taps.clear()
    check_tally(tower.tally, len(stack.attention if stack.by_interface else stack.blocks), stack.name)
    if tower.streams is not None:
        installation.last_calls[stack.name] = LastCall(tower.streams.choice, tower.streams.describe())
    states = getattr(out, "hidden_states", None)
    if isinstance(states, tuple):
        out.hidden_states = TowerStates(states, tower)
    return out


def _run_block(attention: list[nn.Module], override: Override, *args: Any, **kwargs: Any) -> Any:
    tower = current(TowerPass)
    if tower is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    blocks = tower.stack.blocks
    first, last = override.module is blocks[0], override.module is blocks[-1]
    arguments = override.bind(args, kwargs)
    name = next(iter(override.__signature__.parameters))
    hidden = arguments.pop(name)
    if first:
        _check_merge_units(tower, hidden)
    if first and not recomputing():
        tower.plan(
            hidden, arguments.get("cu_seqlens"), arguments.get("attention_mask") if tower.stack.by_interface else None
        )
    else:
        _check_chain(tower, override.module, hidden)

    stream = tower.stream(arguments.get("cu_seqlens"))
    if first:
        hidden = tower.enter(hidden)
    if tower.stack.by_interface:
        _localise_block_arguments(arguments, stream, tower, override.module)
        with active(tower.scope(stream, attention)):
            out = override.original(hidden, **arguments)
    else:
        out = opaque.run_block(override, tower, hidden, arguments)
    local = out[0] if isinstance(out, tuple) else out
    tower.last_output = None if last else local.detach()
    if not last:
        tower.taps[local.data_ptr()] = weakref.ref(local)
    if last:
        local = tower.leave(local)
    return (local, *out[1:]) if isinstance(out, tuple) else local


def _check_merge_units(tower: TowerPass, hidden: Tensor) -> None:
    if hidden.shape[:-1].numel() % tower.stack.unit:
        raise InputError(
            "pixel_values",
            expected=f"a number of patches that is a multiple of {tower.stack.unit}",
            found=f"{hidden.shape[:-1].numel()}",
            remedy="use the model's own image processor",
        )


def _check_chain(tower: TowerPass, block: nn.Module, hidden: Tensor) -> None:
    """Each block must get exactly what the block before returned, or what happened in between ran on a shard."""
    before = tower.last_output
    if before is None or recomputing():  # which starts anywhere
        return
    if before.shape != hidden.shape or before.data_ptr() != hidden.data_ptr():
        raise UnsupportedModelError(
            type(block).__name__,
            expected="blocks that follow one another directly",
            found=f"hidden states {tuple(hidden.shape)} that are not what the block before returned",
            remedy="this tower changes hidden states between its blocks and cannot be sharded",
        )


def _localise_block_arguments(arguments: dict[str, Any], stream: Stream, tower: TowerPass, block: nn.Module) -> None:
    """Replace what describes the whole stream by what describes this rank's tokens."""
    for name in ("position_embeddings", "rotary_pos_emb", "position_ids"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            arguments[name] = tower.table(value)
        elif value is not None:
            arguments[name] = tuple(map(tower.table, value, (1.0, 0.0)))  # cosines and sines: no rotation
    if arguments.get("freqs_ci") is not None:
        arguments["freqs_ci"] = arguments["freqs_ci"][tower.index_in_image()]
    if arguments.get("cu_seqlens") is not None:
        # On the CPU: the block asks for its values, to loop over segments. Ours is one, so it makes one call.
        arguments["cu_seqlens"] = torch.tensor([0, len(stream.own)], dtype=torch.int32)
    if arguments.get("attention_mask") is not None and tower.is_planned_for(arguments["attention_mask"]):
        arguments["attention_mask"] = None  # all that it says is in the stream
    for name in ("attention_mask", "causal_attention_mask", "head_mask", "layer_head_mask"):
        if arguments.get(name) is not None:
            raise UnsupportedModelError(
                type(block).__name__,
                expected=f"no {name}",
                found=f"one of shape {tuple(arguments[name].shape)}",
                remedy="masked patches are not handled; pass images of one size, or call without the mask",
            )
    if arguments.get("output_attentions"):
        raise InputError(
            "output_attentions",
            expected="False",
            found="True",
            remedy="attention weights are never formed; call triton_sp.unwrap(model) to look at them",
        )


def _run_outside(override: Override, *args: Any, **kwargs: Any) -> Any:
    """A part of a tower outside of its blocks. It must not read hidden states between blocks: it would get a shard."""
    tower = current(TowerPass)
    before = None if tower is None else tower.last_output
    if before is not None and before.numel():
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.data_ptr() == before.data_ptr():
                raise UnsupportedModelError(
                    type(override.module).__name__,
                    expected="a tower whose parts read hidden states before its first block or after its last",
                    found="one that reads them between blocks",
                    remedy="this tower cannot be sharded: report the model",
                )
    if tower is not None and before is None and tower.taps:
        args, kwargs = tuple(map(tower.whole, args)), {name: tower.whole(value) for name, value in kwargs.items()}
    return override.original(*args, **kwargs)


def _run_side_module(override: Override, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A module that a tower runs on hidden states between its blocks, on this rank's tokens."""
    tower = current(TowerPass)
    rows = override.original(hidden, *args, **kwargs)
    if tower is None or tower.last_output is None:  # after the last block
        return rows
    return tower.placement.leave_merged(rows, tower.stream(), tower.stack.unit)
