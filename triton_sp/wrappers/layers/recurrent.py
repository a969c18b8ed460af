"""Recurrent layers: their own forward runs, but the functions in which tokens meet are ours.

transformers' layers call a causal convolution and a recurrence by global names of their module, behind which is torch
code or a kernel. A wrapped layer's forward is the same code with other globals, made for each call: no class and no
module is touched, and whatever stands behind the names at that moment is what computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_sp.anatomy.recurrent import CONVOLUTION, FUSED, SIGNATURES, functions_of
from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.cost import find_link
from triton_sp.plan.recurrence import Shape, choose_method
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.layers import recurrence
from triton_sp.wrappers.layers.rules import Recurrence
from triton_sp.wrappers.lookups import with_globals
from triton_sp.wrappers.scope import KEYWORD, AttentionScope, refuse_lost_scope


def redirect(layers: list[nn.Module], installation: Installation) -> None:
    """Let recurrent layers run on shards."""
    for layer in layers:
        installation.override(layer, _run_layer)


def _run_layer(override: Override, *args: Any, **kwargs: Any) -> Any:
    scope: AttentionScope | None = kwargs.pop(KEYWORD, None) or getattr(override.module, KEYWORD, None)
    if scope is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    if override.shadowed is not None:
        raise UnsupportedModelError(
            type(override.module).__name__,
            expected="the forward of its class",
            found="one that something else put on the layer",
            remedy="take it off before wrapping, e.g. by accelerate's remove_hook_from_module",
        )
    arguments = override.bind(args, kwargs)
    hidden: Tensor = arguments["hidden_states"]
    arguments["attention_mask"] = _padding(scope, hidden)
    if not hidden.shape[1]:  # reshapes of the kind (0, -1, D) fail: one row that counts for nothing
        arguments["hidden_states"] = F.pad(hidden, (0, 0, 0, 1))
    functions = _Functions(scope, override.installation, override.module)
    forward = with_globals(inspect.unwrap(type(override.module).forward), functions.by_name())
    out = forward(override.module, **arguments)
    functions.check()
    scope.tally["recurrent"] += 1
    return out[:, : hidden.shape[1]]


def _padding(scope: AttentionScope, hidden: Tensor) -> Tensor | None:
    """(1, T), False at padding that is in the stream because it carries a label: its hidden states count as zero."""
    used, stream = scope.stream.seqused_k, scope.stream
    if used is None or not hidden.shape[1]:
        return None
    lengths = stream.cu_seqlens.diff()
    keep = torch.repeat_interleave(used > 0, lengths, output_size=stream.shards.total)
    return keep[stream.local][None]


class _Functions:
    """What stands in for the functions of one call of a layer."""

    def __init__(self, scope: AttentionScope, installation: Installation, layer: nn.Module) -> None:
        self.scope, self.installation, self.layer = scope, installation, layer
        self.tokens = len(scope.stream.own)
        self.globals = inspect.unwrap(type(layer).forward).__globals__
        self.names = functions_of(layer)
        self.called: list[str] = []

    def by_name(self) -> dict[str, Callable[..., Any]]:
        ours: dict[str, Callable[..., Any]] = {CONVOLUTION: self.convolve, FUSED: lambda *args, **kwargs: None}
        for name in self.names:
            if name in SIGNATURES:
                ours[name] = self._rule(name)
        return {name: function for name, function in ours.items() if name in self.globals}

    def check(self) -> None:
        """Raise unless each function was called once."""
        if sorted(self.called) != sorted(self.names):
            raise UnsupportedModelError(
                type(self.layer).__name__,
                expected=f"one call of each of {sorted(self.names)}",
                found=f"{sorted(self.called)}",
                remedy="report this model",
            )

    def convolve(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **kwargs: Any
    ) -> Tensor:
        """transformers' signature: (1, C, T), weight (C, k); returns (1, C, T)."""
        self.called.append(CONVOLUTION)
        original = self.globals[CONVOLUTION]

        def run(x: Tensor) -> Tensor:
            return original(x, weight, bias, activation=activation)

        x, extra = hidden_states[..., : self.tokens], hidden_states.shape[-1] - self.tokens
        out = recurrence.convolve(x, run, weight.shape[-1] - 1, self.scope.stream)
        if not self.tokens:
            out = recurrence.joined_to(out, weight, *([] if bias is None else [bias]))
        return F.pad(out, (0, extra))

    def _rule(self, name: str) -> Callable[..., Any]:
        def recur(*args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            signature, stream = SIGNATURES[name], self.scope.stream
            rule = Recurrence.of_call(self.globals[name], signature, args, kwargs)
            if rule.arguments.get(signature.initial) is not None or rule.arguments.get(signature.final):
                raise UnsupportedModelError(
                    type(self.layer).__name__,
                    expected="a recurrence that starts from zeros and whose last state is not asked for",
                    found=f"{signature.initial} or {signature.final}",
                    remedy="leave out the cache in training",
                )
            extra = rule.value.shape[1] - self.tokens
            rule = rule.rows(range(self.tokens))
            out = F.pad(recurrence.recur(rule, stream, self._method(rule)), (0, 0, 0, 0, 0, extra))
            return out if signature.state_space else (out, None)

        return recur

    def _method(self, rule: Recurrence) -> Any:
        stream, config = self.scope.stream, self.installation.config
        groups = min(x.shape[2] for x in rule.tokens)
        heads, values = rule.value.shape[2:]
        tokens = [rule.value, *rule.tokens]
        shape = Shape(
            heads, groups, rule.keys, values, sum(x.shape[2:].numel() * x.element_size() for x in tokens), rule.mixed
        )
        link = find_link(config.link, rule.value.device.type, stream.group.size)
        method = choose_method(stream.shards, stream.carry.crosses, shape, link, config.recurrence)
        self.scope.methods.add(method)
        return method
