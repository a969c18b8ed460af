"""Attention that does not go through transformers' interface: a module of somebody's own, or torch's.

If it calls `scaled_dot_product_attention`, that call is head-sharded: q, k and v of the rank's tokens go in, and out
comes the result of attending to the whole stream. If it multiplies matrices itself it runs on gathered tokens and
keeps its part. Which of the two is right is tried out: on its first call a module runs both ways, and the sharded call
is kept only if it gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triton_sp import comm, pipeline
from triton_sp.errors import UnsupportedModelError
from triton_sp.pipeline import Stream
from triton_sp.wrappers.install import Override
from triton_sp.wrappers.scope import active, current, outside

if TYPE_CHECKING:
    from triton_sp.wrappers.vision import TowerPass

HEADS, WHOLE = "heads exchanged", "gather-compute-slice"
_METHOD = "_triton_sp_method"


@dataclass(frozen=True, eq=False)
class UnitScope:
    """While a block with opaque attention runs: its stream, and how to make the hidden states whole again."""

    tower: TowerPass
    stream: Stream


class _ShardSDPA(TorchFunctionMode):
    """Replaces calls of scaled_dot_product_attention on the rank's tokens."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return _sharded_sdpa(self.stream, *args, **kwargs)


def _sharded_sdpa(
    stream: Stream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    tokens = len(stream.shards.range(stream.group.rank))
    fits = query.ndim == 4 and query.shape[0] == 1 and query.shape[2] == key.shape[2] == tokens
    if not fits or attn_mask is not None or dropout_p:
        raise UnsupportedModelError(
            "scaled_dot_product_attention",
            expected=f"q, k, v of shape (1, heads, {tokens}, head_dim), no mask and no dropout",
            found=f"q {tuple(query.shape)}, mask {attn_mask is not None}, dropout {dropout_p}",
            remedy="keep attention on (batch, heads, tokens, head_dim) and express masks as separate images",
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = pipeline.attention(q, k, v, stream, causal=is_causal, scale=scale)
    return out.transpose(0, 1)[None]


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch's fused inference path of MultiheadAttention does not call scaled_dot_product_attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def block_scope(tower: TowerPass, stream: Stream) -> Iterator[None]:
    """While a block with opaque attention runs."""
    with active(UnitScope(tower, stream)), _no_fast_path():
        yield


def run_unit(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention module, or of a whole block without one, on this rank's tokens (1, T, C)."""
    scope = current(UnitScope)
    if scope is None:
        outside(override.module)
        return override.original(*args, **kwargs)
    return unit_runner(override)(*args, **kwargs)


def unit_runner(override: Override) -> Callable[..., Any]:
    scope = current(UnitScope)
    assert scope is not None
    return partial(_run, override, scope)


def _run(override: Override, scope: UnitScope, *args: Any, **kwargs: Any) -> Any:
    unit = override.module
    if isinstance(unit, nn.MultiheadAttention):
        kwargs["need_weights"] = False  # weights would make it multiply matrices itself
    if _METHOD not in unit.__dict__:
        override.installation.set(unit, _METHOD, _try_out(override, scope, args, kwargs))
    scope.tower.tally["attention"] += 1
    if unit.__dict__[_METHOD] == WHOLE:
        return _run_whole(override, scope, args, kwargs)
    return _run_heads(override, scope, args, kwargs)[0]


def _run_heads(override: Override, scope: UnitScope, args: Any, kwargs: Any) -> tuple[Any, int]:
    # The block's own scope must not be seen by modules inside the unit: it is one unit, not several.
    with active(None), _ShardSDPA(scope.stream) as mode:
        out = override.original(*args, **kwargs)
    return out, mode.calls


def _run_whole(override: Override, scope: UnitScope, args: Any, kwargs: Any) -> Any:
    """On the hidden states of all tokens; every tensor argument of the rank's tokens is made whole first."""
    tokens = len(scope.stream.shards.range(scope.stream.group.rank))
    seen: dict[int, Tensor] = {}

    def whole(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != (1, tokens):
            return x
        if id(x) not in seen:
            seen[id(x)] = scope.tower.whole(x)
        return seen[id(x)]

    with active(None):
        out = override.original(*map(whole, args), **{name: whole(value) for name, value in kwargs.items()})
    first = out[0] if isinstance(out, tuple) else out
    local = pipeline.shard(first.flatten(0, -2), scope.stream)[None]
    return (local, *out[1:]) if isinstance(out, tuple) else local


def _try_out(override: Override, scope: UnitScope, args: Any, kwargs: Any) -> str:
    """Run both ways without gradients and without dropout, and let all ranks come to one verdict."""
    modes = [(module, module.training) for module in override.module.modules()]
    devices = [args[0].device] if args and isinstance(args[0], Tensor) and args[0].is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        override.module.eval()
        try:
            expected = _first(_run_whole(override, scope, args, kwargs))
            wrong = torch.zeros(1, device=expected.device)
            try:
                found, calls = _run_heads(override, scope, args, kwargs)
                close = calls > 0 and torch.allclose(_first(found), expected, rtol=1e-3, atol=_tolerance(expected))
                wrong += not close
            except UnsupportedModelError:
                wrong += 1
            wrong = comm.all_reduce(wrong, scope.stream.group)
        finally:
            for module, mode in modes:
                module.training = mode
    return WHOLE if wrong.item() else HEADS


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _tolerance(x: Tensor) -> float:
    """Rounding of the dtype at the size of the values, with room for another order of summation."""
    size = float(x.abs().max()) if x.numel() else 0.0
    return 64 * torch.finfo(x.dtype).eps * size


def method_of(unit: nn.Module) -> str:
    """How an opaque attention module runs, once its first call has shown it."""
    return unit.__dict__.get(_METHOD, "decided on the first call")

