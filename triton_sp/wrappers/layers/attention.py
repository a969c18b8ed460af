"""The attention function that wrapped Hugging Face models call in place of sdpa or flash attention.

Modules look their function up by the name in their own `config`. While one runs in a scope, that is a copy of its
configuration with our name in it. Masks are made for the original implementation, which computes whatever runs without
a scope (generate, other models, direct calls).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triton_sp import stages
from triton_sp.anatomy.families import expected_window, layer_type, numbers_its_tokens
from triton_sp.errors import UnsupportedModelError
from triton_sp.wrappers import graphs
from triton_sp.wrappers.install import Installation, Override, replaced
from triton_sp.wrappers.layers import rotation
from triton_sp.wrappers.scope import KEYWORD, AttentionScope, refuse_lost_scope

NAME = "triton_sp"
LAYER = "_triton_sp_layer"  # the attribute of an attention module with its type and its sliding window
NUMBERING = "_triton_sp_numbering"  # the one that holds its `_TrueIndex`, while it runs
# Arguments that change what attention computes and that we do not compute.
_MEANINGFUL = ("position_bias", "head_mask", "layer_head_mask", "block_mask", "alibi")


def redirect(attention: Sequence[nn.Module], installation: Installation) -> None:
    """Let attention modules look up our function."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    copies: dict[int, Any] = {}
    for module in attention:
        config: Any = module.config
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._attn_implementation_internal = NAME
        # Looked up once: a graph that reads the number of a layer is one layer's, and torch makes 8 of a kind at most.
        installation.set(module, LAYER, (layer_type(module), expected_window(module)))
        rotation.prepare(module, installation)
        run = partial(_run_attention, copies[id(config)], numbers_its_tokens(module))
        installation.override(module, run, traced=True)


def _run_attention(config: Any, numbers_tokens: bool, override: Override, *args: Any, **kwargs: Any) -> Any:
    """An attention module's forward; in a scope it calls our function, whose name is in `config`."""
    scope: AttentionScope | None = kwargs.get(KEYWORD, getattr(override.module, KEYWORD, None))
    if scope is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    hidden = args[0] if args else kwargs.get("hidden_states")
    run: Callable[..., Any] = override.original
    if not (torch.compiler.is_compiling() or _is_verified(override.module, scope)):
        run = partial(rotation.run_module, override, scope.forward)
    with replaced(override.module, "config", config):
        if numbers_tokens and scope.index is not None:
            index = scope.index if len(scope.index) else scope.index.new_zeros(1)
            with _TrueIndex(index) as numbering, replaced(override.module, NUMBERING, numbering):
                return _run_with_a_row(override, run, hidden, args, kwargs)
        return _run_with_a_row(override, run, hidden, args, kwargs)


def _is_verified(module: nn.Module, scope: AttentionScope) -> bool:
    """Whether a layer is computed once more in this call, by a textbook that does not rotate."""
    return scope.proof is not None and scope.proof.layer is module


class _TrueIndex(TorchFunctionMode):
    """Where attention numbers its tokens, it gets the numbers that they have in their rows: until it attends, because
    what runs then counts heads' rows, which may be as many (on 3 ranks logits were off 1 %)."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index, self.over = index, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.over and func is torch.arange and args == (len(self.index),):
            return self.index
        return func(*args, **(kwargs or {}))


def _run_with_a_row(
    override: Override, run: Callable[..., Any], hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A rank without tokens attends with one row that counts for nothing: reshapes of the kind (0, -1, D) fail."""
    if not isinstance(hidden, Tensor) or hidden.numel():
        return run(*args, **kwargs)
    arguments = {name: _with_a_row(name, value) for name, value in override.bind(args, kwargs).items()}
    out = run(**arguments)
    return (out[0][..., :0, :], *out[1:]) if isinstance(out, tuple) else out[..., :0, :]


def _with_a_row(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_with_a_row(name, part) for part in value)
    if name == "cu_seqlens":
        return torch.tensor([0, 1], dtype=value.dtype, device=value.device)
    if not isinstance(value, Tensor) or value.numel():
        return value
    axis = value.shape.index(0)
    return torch.cat([value, value.new_zeros(*value.shape[:axis], 1, *value.shape[axis + 1 :])], axis)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature: q (B, H, L, D), k and v (B, K, L, D), learned sinks s_aux (H,); returns
    (B, L, H, D) and None."""
    scope: AttentionScope = kwargs.pop(KEYWORD, None) or getattr(module, KEYWORD)
    decoder = scope.decoder
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    if scope.causal is not None:
        causal = scope.causal
    _refuse(module, attention_mask, dropout, causal != decoder, sliding_window if decoder else None, decoder, kwargs)
    states, (kind, _) = _packed(query, key, value), getattr(module, LAYER)
    if torch.compiler.is_compiling():
        local = scope.local.get(kind, scope.local[None])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = [] if s_aux is None else [s_aux]
        how = (kind, local, causal, sliding_window, softcap or 0.0, scale)
        return graphs.sharded_attention(states + sinks, scope.handle, *how)[0][None], None
    scope.tally["attention"] += 1
    if (numbering := module.__dict__.get(NUMBERING)) is not None:
        numbering.over = True
    tokens, stream = len(scope.stream.own), scope.stream_of(kind)
    q, k, v = (x[:tokens] for x in states)
    masked: dict[str, Any] = {"causal": causal, "window": sliding_window, "sinks": s_aux}
    if (tables := rotation.rotation_of(module, query, key, value)) is not None:
        masked["rotation"] = tables.rows(tokens)
    attend = scope.proof.attend if scope.proof is not None and _is_verified(module, scope) else stages.attention
    out = attend((q, k, v), stream, **masked, softcap=softcap, softmax_scale=scaling)
    if query.shape[2] > tokens:  # the row of `_with_a_row`
        out = F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - tokens))
    return out[None], None


def _packed(*states: Tensor) -> list[Tensor]:
    """(1, H, T, D) -> (T, H, D), in one dtype: autocast leaves q and k in fp32 after the rotation, v in its own."""
    assert all(x.shape[0] == 1 for x in states), [x.shape for x in states]
    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return [x[0].transpose(0, 1).to(dtype) for x in states]


def _refuse(
    module: nn.Module,
    mask: Tensor | None,
    dropout: float,
    direction_differs: bool,
    window: int | None,
    decoder: bool,
    others: dict[str, Any],
) -> None:
    """Raise for whatever would change the result and is not computed here: nothing is dropped in silence."""

    def refuse(expected: str, found: str, remedy: str) -> None:
        raise UnsupportedModelError(type(module).__name__, expected=expected, found=found, remedy=remedy)

    if dropout:
        refuse("attention without dropout", f"dropout={dropout}", "set the configuration's attention_dropout to 0")
    if direction_differs:
        refuse("causal attention in decoders, full attention in towers", "the opposite", "report this model")
    if mask is not None and not (decoder and mask.shape == (1, 1, 1, 1)):
        refuse("no mask but segments, causality and window", f"a mask {tuple(mask.shape)}", "report this model")
    if decoder and window != (expected := getattr(module, LAYER)[1]):
        refuse(f"sliding_window={expected} as the configuration says", f"{window}", "report this model")
    for name in _MEANINGFUL:
        if others.get(name) is not None:
            refuse(f"attention without {name}", f"a value of type {type(others[name]).__name__}", "report this model")
