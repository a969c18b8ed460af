"""Recurrences as transformers' layers call them: gated delta rules and state space models, in torch or by a kernel.

All keep a state of (keys, values) a head, which each token multiplies and adds to: S <- M S + U, out = q S. So what
some tokens do to the state is an affine map, and their outputs are linear in the state that they find. In state space
models M is a number. In delta rules it is a matrix, and one run of the layer's own function gives all of it: the state
begins with the identity as further value channels, for which tokens have zeros. These channels then are M in the last
state and, in the outputs, what each token makes of the state that was found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp.anatomy.recurrent import Signature


class Affine(NamedTuple):
    """A run of some tokens: `out` from a state of zeros (1, T, H, V), `response` of each token to the state that was
    found (1, T, H, K), and what becomes of that state: `mix` times it, (H, K, K) or a number for all, and `update`
    (H, K, V) more."""

    out: Tensor
    response: Tensor
    mix: Tensor
    update: Tensor


@dataclass(frozen=True)
class Recurrence:
    """A call of such a function: its arguments by name, the first `positional` of which are passed by position."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    positional: int
    signature: Signature

    @classmethod
    def of_call(
        cls, function: Callable[..., Any], signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Recurrence:
        """The call function(*args, **kwargs), not done yet. Kernels name the first arguments in their own way."""
        names = list(inspect.signature(function).parameters)[: len(args)]
        return cls(function, dict(zip(names, args, strict=True)) | kwargs, len(args), signature)

    @property
    def value(self) -> Tensor:
        """(1, T, H, V)."""
        return self.arguments[self.signature.value]

    @property
    def keys(self) -> int:
        """K, the channels of a key."""
        return self.arguments[self.signature.key].shape[-1]

    @property
    def tokens(self) -> list[Tensor]:
        """The arguments that have an entry for each token."""
        return [self.arguments[name] for name in self.signature.per_token]

    @property
    def weights(self) -> list[Tensor]:
        """The arguments that have an entry for each head."""
        given = [self.arguments.get(name) for name in self.signature.per_head]
        return [x for x in given if x is not None]

    def with_arguments(self, **changes: Any) -> Recurrence:
        """The same call with other arguments."""
        return replace(self, arguments=self.arguments | changes)

    def with_tokens(self, tokens: list[Tensor]) -> Recurrence:
        """The same call of other tokens."""
        return self.with_arguments(**dict(zip(self.signature.per_token, tokens, strict=True)))

    def rows(self, rows: range) -> Recurrence:
        """The same call of some of the tokens."""
        return self.with_tokens([x[:, rows.start : rows.stop] for x in self.tokens])

    def weights_of(self, heads: range) -> Recurrence:
        """The same call with the weights of some heads only."""
        names = [name for name in self.signature.per_head if self.arguments.get(name) is not None]
        return self.with_arguments(**{name: self.arguments[name][heads.start : heads.stop] for name in names})

    def run(self, initial: Tensor | None = None, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """The outputs (1, T, H, V), and the last state (H, K, V) if it is wanted."""
        names = self.signature
        given = None if initial is None else (initial.mT if names.state_space else initial)[None].contiguous()
        items = list((self.arguments | {names.initial: given, names.final: final}).items())
        result = self.function(*(value for _, value in items[: self.positional]), **dict(items[self.positional :]))
        out, state = result if isinstance(result, tuple) else (result, None)
        if state is None or not final:
            return out, None
        return out, state[0].mT if names.state_space else state[0]

    @property
    def mixed(self) -> int:
        """How many columns `Affine.mix` has: a number for all keys has one."""
        return 1 if self.signature.state_space else self.keys

    def affine(self) -> Affine:
        """Run the tokens for any state that they may find; see the head of this file."""
        return self._decaying() if self.signature.state_space else self._with_identity()

    def _with_identity(self) -> Affine:
        value, keys = self.value, self.keys
        heads, values = value.shape[2:]
        wide = torch.promote_types(value.dtype, torch.float32)
        identity = torch.eye(keys, dtype=wide, device=value.device).expand(heads, keys, keys)
        initial = F.pad(identity, (values, 0))
        out, state = self.with_arguments(**{self.signature.value: F.pad(value, (0, keys))}).run(initial, final=True)
        assert state is not None
        return Affine(out[..., :values], out[..., values:], state[..., values:], state[..., :values])

    def _decaying(self) -> Affine:
        given, heads = self.arguments, self.value.shape[2]
        out, update = self.run(final=True)
        assert update is not None
        step = given["dt"].to(update.dtype)
        if given.get("dt_bias") is not None:
            step = step + given["dt_bias"]
        if given.get("dt_softplus"):
            step = F.softplus(step)
        step = step.clamp(*given.get("dt_limit", (0.0, float("inf"))))
        decay = (step * given["A"]).cumsum(1).exp()  # of the state that was found, at each token
        reads = given["C"].to(decay.dtype).repeat_interleave(heads // given["C"].shape[2], 2)
        mix = decay[0, -1, :, None, None].expand(heads, self.keys, 1)
        return Affine(out, reads * decay[..., None], mix, update)


def passed_on(state: Tensor, mix: Tensor, update: Tensor) -> Tensor:
    """The state (H, K, V) after some tokens, from the state before them and what they do to it."""
    return (mix * state if mix.shape[-1] == 1 else mix @ state) + update
