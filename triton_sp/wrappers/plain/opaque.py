"""Attention that does not go through transformers' interface: a module of somebody's own, or torch's.

If it calls `scaled_dot_product_attention`, that call is head-sharded: q, k and v of the rank's tokens go in, and out
comes the result of attending to the whole stream. If it multiplies matrices itself it runs on gathered tokens and
keeps its part. Which of the two is right is tried out on the first call of each block, see trial.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.install import Override
from triton_sp.wrappers.plain.sdpa import OpaqueScope, ShardSDPA, no_fast_path
from triton_sp.wrappers.plain.trial import HEADS, find_method, hidden_of, random_states, shards_inside
from triton_sp.wrappers.scope import active, current, refuse_lost_scope
from triton_sp.wrappers.towers.hidden import HiddenShape

if TYPE_CHECKING:
    from triton_sp.wrappers.towers.tower import TowerPass

METHOD = "_triton_sp_method"


def run_attention_module(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention module inside a block that runs on this rank's tokens."""
    scope = current(OpaqueScope)
    if scope is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    if isinstance(override.module, nn.MultiheadAttention):
        args, kwargs = (), override.bind(args, kwargs)
        kwargs["need_weights"] = False  # weights would make it multiply matrices itself
    if scope.method == HEADS:
        return override.original(*args, **kwargs)
    return run_in(scope, override.original, *args, **kwargs)


def run_in(scope: OpaqueScope, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in which all tokens meet, with this rank's tokens, for this rank's tokens."""
    if scope.method == HEADS:
        with active(scope), no_fast_path(), ShardSDPA(scope):
            return function(*args, **kwargs)
    with active(None), no_fast_path():
        gathered: dict[int, Tensor] = {}

        def gather(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.shape[:-1] != scope.shape:
                return x
            if id(x) not in gathered:  # self-attention stays self-attention: q, k and v are one object
                gathered[id(x)] = scope.gather(x)
            return gathered[id(x)]

        out = function(*map(gather, args), **{name: gather(value) for name, value in kwargs.items()})
    if isinstance(out, tuple):
        return (scope.own(out[0]), *out[1:])
    return scope.own(out)


def same_tokens(out: Any, scope: OpaqueScope, module: nn.Module) -> Any:
    """`out`, if it holds one row for each of the rank's tokens."""
    if hidden_of(out).shape[:-1] != scope.shape:
        raise InputError(
            type(module).__name__,
            expected=f"an output of shape {(*scope.shape, 'channels')}",
            found=f"{tuple(hidden_of(out).shape)}",
            remedy="arguments that differ between the images of a batch are not handled; pass one image at a time",
        )
    return out


def method_of(module: nn.Module) -> str | None:
    """How a module with opaque attention runs, once its first call has shown it."""
    return module.__dict__.get(METHOD)


# --- blocks of a plain module --------------------------------------------------------------------------------------


def run_block(override: Override, tower: TowerPass, hidden: Tensor, arguments: dict[str, Any]) -> Any:
    """A block on this rank's tokens. `arguments` are those of all tokens; what runs along the tokens is cut here."""
    block, layout = override.module, tower.shape

    def run(scope: OpaqueScope | None, states: Tensor) -> Any:
        if scope is not None and scope.method == HEADS:
            return run_in(scope, override.original, states, **localise_arguments(arguments, scope.stream, layout))
        if scope is not None and block in tower.stack.attention:
            return run_in(scope, override.original, states, **arguments)
        with active(scope), no_fast_path():
            return override.original(states, **arguments)

    stream = tower.stream(arguments.get("cu_seqlens"))
    method = method_of(block)
    if method is None:
        cut = Stream(stream.group, shards_inside(layout.tokens, layout.length, stream.group.size), stream.cu_seqlens)
        probe = random_states(layout.shape, hidden)
        method = find_method(block, run, lambda method, dry: OpaqueScope(method, cut, layout, dry), probe, stream.group)
        override.installation.set(block, METHOD, method)
    verified = tower.proof is not None and tower.proof.layer in (block, *block.modules())
    scope = OpaqueScope(method, stream, layout, proof=tower.proof if verified else None)
    out = same_tokens(run(scope, hidden), scope, block)
    tower.tally["attention"] += 1
    return out


def localise_arguments(arguments: dict[str, Any], stream: Stream, layout: HiddenShape) -> dict[str, Any]:
    """Arguments with this rank's rows of every tensor that runs along the tokens of the batch or of each image.

    Only shapes are looked at. Where these mislead, the trial shows it.
    """
    start, count = stream.own.start, len(stream.own)

    def rows(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(map(rows, x))
        if not isinstance(x, Tensor) or not x.ndim or not layout.tokens:
            return x
        if x.shape[:-1] == layout.shape[:-1] and x.ndim == len(layout.shape):
            return layout.local(layout.flat(x)[start : start + count])
        if x.shape[0] == layout.length:  # the same for every image
            return x[torch.arange(start, start + count, device=x.device) % layout.length]
        return x[start : start + count] if x.shape[0] == layout.tokens else x

    given = {name: rows(value) for name, value in arguments.items()}
    if arguments.get("cu_seqlens") is not None:
        given["cu_seqlens"] = torch.tensor([0, count], dtype=torch.int32)  # one call of attention, not one a segment
    return given
