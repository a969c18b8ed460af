"""Attention that does not go through transformers' interface: a module of somebody's own, or torch's.

If it calls `scaled_dot_product_attention`, that call is head-sharded: q, k and v of the rank's tokens go in, and out
comes the result of attending to the whole stream. If it multiplies matrices itself it runs on gathered tokens and
keeps its part. Which of the two is right is tried out on the first call of each block, see trial.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triton_sp import stages
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.hidden import HiddenShape, SequencesShape
from triton_sp.wrappers.install import Override
from triton_sp.wrappers.scope import active, current, refuse_lost_scope
from triton_sp.wrappers.trial import HEADS, find_method, hidden_of, random_states, shards_inside

if TYPE_CHECKING:
    from triton_sp.wrappers.tower import TowerPass

METHOD = "_triton_sp_method"


@dataclass(frozen=True, eq=False)
class OpaqueScope:
    """While a module with opaque attention runs on this rank's tokens.

    Attributes:
        method: HEADS or GATHERED.
        stream: all tokens.
        layout: the shape of the hidden states of all tokens, and of a rank's.
        dry: nothing is sent and the values mean nothing, to find out whether a method runs at all.
        tally: counts the attention calls that came by.
    """

    method: str
    stream: Stream
    layout: HiddenShape | SequencesShape
    dry: bool = False
    tally: Counter[str] = field(default_factory=Counter)

    @cached_property
    def shape(self) -> torch.Size:
        """This rank's hidden states without their channels."""
        return self.own(torch.empty(self.layout.shape, device="meta")).shape[:-1]

    def gather(self, local: Tensor) -> Tensor:
        """The hidden states of all tokens, from this rank's."""
        if self.dry:
            return local.new_zeros(*self.layout.shape[:-1], local.shape[-1])
        return self.layout.restore(stages.gather(self.layout.rows(local), self.stream))

    def own(self, x: Tensor) -> Tensor:
        """This rank's hidden states, from those of all tokens."""
        return self.layout.local(stages.shard(self.layout.flat(x), self.stream))


# --- heads exchanged -----------------------------------------------------------------------------------------------


class _ShardSDPA(TorchFunctionMode):
    """Replaces calls of scaled_dot_product_attention on the rank's tokens."""

    def __init__(self, scope: OpaqueScope) -> None:
        super().__init__()
        self.attend = partial(_sharded_sdpa, scope)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self.attend
        elif func is F.multi_head_attention_forward:
            # torch switches the mode off inside its own functions, so this one is run with our attention in place
            # of the global name that it looks up; the function itself is not touched.
            names = F.multi_head_attention_forward.__globals__ | {
                "scaled_dot_product_attention": self.attend,
                "has_torch_function": lambda _: False,
            }
            func = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        return func(*args, **(kwargs or {}))


def _sharded_sdpa(
    scope: OpaqueScope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA's signature: (B, H, T, D), or (H, T, D) without a batch."""
    if dropout_p:
        raise UnsupportedModelError(
            "scaled_dot_product_attention",
            expected="attention without dropout",
            found=f"dropout_p={dropout_p}",
            remedy="set the attention's dropout to 0, or train with model.eval() around it",
        )
    if query.ndim == 3:
        return _sharded_sdpa(scope, query[None], key[None], value[None], attn_mask, 0.0, is_causal, scale)[0]
    tokens = len(scope.stream.own)
    rows = scope.shape.numel() // tokens if tokens else query.shape[0]
    fits = query.ndim == 4 and query.shape[0] == rows and query.shape[2] == key.shape[2] == tokens
    if not fits or attn_mask is not None:
        raise UnsupportedModelError(
            "scaled_dot_product_attention",
            expected=f"q, k, v of shape ({rows}, heads, {tokens}, head_dim) and no mask",
            found=f"q {tuple(query.shape)}, {'no mask' if attn_mask is None else f'a mask {tuple(attn_mask.shape)}'}",
            remedy="keep attention on (batch, heads, tokens, head_dim) and express masks as separate images",
        )
    scope.tally["sdpa"] += 1
    if scope.dry:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    # Rows that share their tokens' positions are as independent as heads are, so they are treated as more heads.
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (query, key, value))
    out = stages.attention(q, k, v, scope.stream, causal=is_causal, softmax_scale=scale)
    return out.transpose(0, 1).unflatten(0, query.shape[:2])


@contextmanager
def no_fast_path() -> Iterator[None]:
    """torch's fused inference path of MultiheadAttention does not call scaled_dot_product_attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- either method -------------------------------------------------------------------------------------------------


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
        with active(scope), no_fast_path(), _ShardSDPA(scope):
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
    scope = OpaqueScope(method, stream, layout)
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
