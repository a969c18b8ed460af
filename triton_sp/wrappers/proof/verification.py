"""The proof at run time: now and then one layer's attention is computed once more, whole, on one rank, and compared.

This is done every `SPConfig.verify` forwards, over all layers in turn. What the layer was given and what came out of it
travel to one rank, and in the backward the gradients, which that rank computes by the textbook (`ops/exact.py`). So it
proves what the ranks cut, exchanged and put together, as well as the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp import stages
from triton_sp.errors import VerificationError
from triton_sp.ops import exact
from triton_sp.ops.differentiable import once_differentiable
from triton_sp.plan.route import States
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.backwards import note_backward
from triton_sp.wrappers.install import Installation
from triton_sp.wrappers.plain.opaque import method_of
from triton_sp.wrappers.plain.trial import GATHERED
from triton_sp.wrappers.proof.verdict import Attended, compare, rows_of_all
from triton_sp.wrappers.scope import recomputing


def next_proof(installation: Installation) -> Proof | None:
    """What verifies a layer of the forward that begins, the same on every rank, or None; a recomputation keeps it."""
    every = installation.config.verify
    if recomputing():
        return installation.proof
    installation.forwards += 1
    if not every:
        return None
    layers = [layer for stack in installation.anatomy.stacks for layer in stack.attention or stack.blocks]
    layers = [layer for layer in layers if method_of(layer) != GATHERED]
    if installation.forwards % every or not layers:
        return None
    around, turn = divmod(installation.forwards // every - 1, len(layers))
    named = installation.anatomy.entry.named_modules()
    name = next((name for name, module in named if module is layers[turn]), type(layers[turn]).__name__)
    return Proof(layers[turn], name, (around + turn) % installation.group.size, installation.forwards, installation)


def describe_verification(installation: Installation | None) -> str:
    """For `explain`: how often a layer is verified, and the last result."""
    if installation is None or installation.idle or not installation.config.verify:
        return ""
    every = installation.config.verify
    often = "one layer in every forward" if every == 1 else f"one layer in every {every} forwards"
    return f"{often}; {installation.verified or 'none yet'}"


@dataclass(frozen=True, eq=False)
class Proof:
    """The verification of one layer in a forward, by its number, and its backward: `rank` does it, all are told."""

    layer: nn.Module
    name: str
    rank: int
    forward: int
    installation: Installation

    @torch.compiler.disable(reason="what is verified is compared by the host")
    def attend(self, states: States, stream: Stream, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
        """`stages.attention`, verified.

        Raises:
            VerificationError: on every rank, where the result or a gradient is off by more than rounding explains.
        """
        scale = options.get("softmax_scale") or states[0].shape[-1] ** -0.5
        formula = exact.Formula(scale, options.get("softcap") or 0.0, None if sinks is None else sinks.detach())
        heads = states[0].shape[1], states[1].shape[1]
        call = Attended(stream, options["causal"], options.get("window"), heads, formula)
        given, held = tuple(x.detach() for x in states), list[Tensor]()
        if torch.is_grad_enabled() and any(x.requires_grad for x in states):
            states = _Watch.apply(self, call, held, *states)
            note_backward(states[0])
        out = stages.attention(states, stream, sinks=sinks, **options)
        if not recomputing():
            self._compare(call, (*given, out.detach()), call.attend)
        if out.requires_grad:
            out.register_hook(held.append)
        return out

    def compare_gradients(self, call: Attended, states: States, dout: Tensor, grads: States) -> None:
        """What came of q, k and v in the backward, given the gradient of the result."""
        self._compare(call, (*states, dout, *grads), call.backward)

    def _compare(self, call: Attended, own: Sequence[Tensor], compute: Callable[..., dict[str, exact.Bounded]]) -> None:
        """The last of `own` are to be what `compute` makes of those before them, of all ranks' rows."""
        verdict = ""
        with torch.no_grad(), torch.autocast(own[0].device.type, enabled=False):
            if whole := rows_of_all(own, call.stream, self.rank):
                wanted = compute(*whole)
                found = zip(wanted.items(), whole[-len(wanted) :], strict=True)
                verdict = max((compare(name, x, bounded, call) for (name, bounded), x in found), key=itemgetter(0)).text
        everyone = collectives.notices_of_all(verdict.encode(), self.installation.group)
        self._conclude([text.decode(errors="replace") for text in everyone], own[0].dtype)

    def _conclude(self, verdicts: Sequence[str], dtype: torch.dtype) -> None:
        wrong = next((rank for rank, text in enumerate(verdicts) if text.startswith("! ")), None)
        when = f"forward {self.forward}, {self.name}"
        if wrong is None:
            before, told = self.installation.verified, next(filter(None, verdicts), "no tokens")
            self.installation.verified = f"{before}, {told}" if before.startswith(when) else f"{when}: {told}"
            return
        self.installation.verified = f"{when}: wrong"
        error = VerificationError(
            self.name,
            expected=f"what rank {wrong} computes of it alone, up to rounding in {str(dtype)[6:]}",
            found=verdicts[wrong][2:],
            remedy='see whether SPConfig(attention="torch") changes this: then kernels are wrong there, which '
            "python -m triton_sp.kernels.check examines; else report it",
            rank=self.installation.group.rank,
        )
        error.everywhere = True  # type: ignore[attr-defined]
        raise error


class _Watch(torch.autograd.Function):
    """q, k and v as they are; in the backward their gradients come by."""

    @staticmethod
    def forward(ctx: Any, proof: Proof, call: Attended, held: list[Tensor], *states: Tensor) -> tuple[Tensor, ...]:
        ctx.proof, ctx.call, ctx.held = proof, call, held
        ctx.save_for_backward(*states)
        return tuple(x.view_as(x) for x in states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.proof.compare_gradients(ctx.call, ctx.saved_tensors, ctx.held.pop(), grads)
        return None, None, None, *grads
