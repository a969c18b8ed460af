"""torch.compile: what of a wrapped model is traced into graphs, what runs between them, and attention as one operator.

Most overrides talk to other ranks or read values of tensors, so they run between graphs, and the model's own code that
they call is compiled again. Attention modules are traced. Their two exchanges are one registered operator, so that a
decoder layer is one graph. A graph takes and gives tensors only, so what belongs to a call travels as a number: the
scope of attention, and what attention keeps for its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from triton_sp import stages
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.ops import varlen
from triton_sp.plan.stream import Stream

# --- between graphs ------------------------------------------------------------------------------------------------

# What compiles frames, while an override runs between graphs. torch.compiler.disable has no opposite.
_compiler: ContextVar[Any] = ContextVar("triton_sp_compiler", default=None)


@torch.compiler.disable(recursive=False, reason="what it calls is not compiled")
def between_graphs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is not to be compiled, from a frame that is not compiled itself."""
    compiler = set_eval_frame(None)
    if compiler is None:
        return function(*args, **kwargs)
    token = _compiler.set(compiler)
    try:
        return function(*args, **kwargs)
    finally:
        _compiler.reset(token)
        set_eval_frame(compiler)


@torch.compiler.disable(recursive=False, reason="it only hands on")
def compiled_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the model's own code from within `between_graphs`, compiled as whatever is around it."""
    compiler = _compiler.get()
    if compiler is None:
        return function(*args, **kwargs)
    before = set_eval_frame(compiler)
    try:
        return function(*args, **kwargs)
    finally:
        set_eval_frame(before)


def has_graphs(model: nn.Module) -> bool:
    """Whether torch.compile was asked for the model or for a part of it; to be called from within `between_graphs`."""
    return _compiler.get() is not None or any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()
    )


# --- what travels as a number --------------------------------------------------------------------------------------

_numbers = count()
_held: WeakValueDictionary[int, Any] = WeakValueDictionary()


def hold(thing: Any) -> Tensor:
    """A tensor that stands for an object, which lives as long as the tensor."""
    number = next(_numbers)
    handle: Any = torch.tensor(number, device="cpu")
    handle.holds = _held[number] = thing
    return handle


def held(handle: Tensor) -> Any:
    """The object that a tensor stands for.

    Raises:
        UnsupportedModelError: it is gone, because the graph was given or has kept a copy of the tensor.
    """
    thing = _held.get(int(handle))
    if thing is None:
        raise UnsupportedModelError(
            "torch.compile",
            expected="a graph that keeps its tensors for the backward",
            found="one that has kept copies of them",
            remedy="do not offload or copy saved tensors around compiled layers, or leave out torch.compile",
        )
    return thing


# --- attention as an operator --------------------------------------------------------------------------------------


class _Kept:
    """What attention keeps for its backward, as autograd's own context does for `stages.ExchangeHeads`."""

    stream: Stream
    layer: stages.Layer
    saved_tensors: tuple[Tensor, ...] = ()
    needs_input_grad = (True,)  # without a backward nothing holds the number, and what it stands for is gone at once

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@torch.library.custom_op("triton_sp::sharded_attention", mutates_args=())
def sharded_attention(
    states: list[Tensor],
    scope: Tensor,
    layer_type: str | None,
    local: bool,
    causal: bool,
    window: int | None,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`stages.attention` of q, k and v, and perhaps sinks, in the scope that a number stands for.

    Args:
        states: of this rank's tokens, with a row that counts for nothing where it has none.
        local: whether there is no exchange. The graph keeps what such a layer needs for its backward.

    Returns:
        The output, the log-sum-exp of a local layer, and a number for what else is kept.
    """
    (q, k, v, *learned), found = states, held(scope)
    if found.proof is not None:
        raise InputError(
            "SPConfig.verify",
            expected="0 for layers in graphs of torch.compile",
            found=f"{found.proof.installation.config.verify}",
            remedy="verify some steps without torch.compile",
        )
    found.tally["attention"] += 1
    stream, kept = found.stream_of(layer_type), _Kept()
    rows, tokens = len(q), len(stream.own)
    own, sinks = (q[:tokens], k[:tokens], v[:tokens]), next(iter(learned), None)
    kept.stream = stream
    kept.layer = layer = stages.Layer(causal, window, softcap, scale, (q.shape[-1], v.shape[-1]), stream.attention)
    with torch.autocast(q.device.type, enabled=False):
        if local:
            mask = stream.mask(stream.own, stream.own, causal, window)
            out, lse = varlen.forward(*own, mask, **layer.factors, sinks=sinks)
        else:
            out, lse = stages.ExchangeHeads.forward(kept, *own, sinks, stream, layer), q.new_empty(0)
    if rows > tokens:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, rows - tokens)), F.pad(lse, (0, rows - tokens)) if local else lse
    return out, lse, hold(kept)


@sharded_attention.register_fake
def _(
    states: list[Tensor], scope: Tensor, layer_type: str | None, local: bool, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = varlen.empty_results(*states[:3])
    return out, lse if local else lse.new_empty(0), scope.new_empty(())


@torch.library.custom_op("triton_sp::sharded_attention_backward", mutates_args=())
def sharded_attention_backward(
    dout: Tensor, saved: list[Tensor], number: Tensor, kv_heads: int, dim: int, local: bool
) -> list[Tensor]:
    """The gradients of q, k and v, and of sinks if there are any.

    Args:
        saved: the sinks, if there are any; before them, of a local layer, q, k, v, its output and log-sum-exp.
    """
    kept: _Kept = held(number)
    stream, layer, rows = kept.stream, kept.layer, len(dout)
    tokens = len(stream.own)
    with torch.autocast(dout.device.type, enabled=False):
        if local:
            q, k, v, out, lse, *sinks = saved
            states = (*(x[:tokens] for x in (q, k, v, out)), lse[:, :tokens], *sinks)
            mask = stream.mask(stream.own, stream.own, layer.causal, layer.window)
            grads = varlen.backward(dout[:tokens], None, states, mask, **layer.factors)
        else:
            sinks = saved
            grads = stages.ExchangeHeads.backward(kept, dout[:tokens])
    dq, dk, dv, *others = (grad for grad in grads if grad is not None)
    dstates = [F.pad(x, (0, 0, 0, 0, 0, rows - tokens)).contiguous() for x in (dq, dk, dv)]
    return dstates + [grad.to(sink.dtype) for grad, sink in zip(others, sinks, strict=True)]


@sharded_attention_backward.register_fake
def _(dout: Tensor, saved: list[Tensor], number: Tensor, kv_heads: int, dim: int, local: bool) -> list[Tensor]:
    rows, heads, v_dim = dout.shape
    shapes = (rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, v_dim)
    return [dout.new_empty(shape) for shape in shapes] + [torch.empty_like(x) for x in saved[5 if local else 0 :]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (q, k, v, *sinks), ctx.local = inputs[0], inputs[3]
    out, lse, number = output
    ctx.shape = k.shape[1:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(number, *((q, k, v, out, lse) if ctx.local else ()), *sinks)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    assert dout is not None
    number, *saved = ctx.saved_tensors
    return sharded_attention_backward(dout.contiguous(), saved, number, *ctx.shape, ctx.local), *[None] * 7


sharded_attention.register_autograd(_backward, setup_context=_setup)
