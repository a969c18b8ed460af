"""The language-modelling head of a training step whose loss never forms all logits.

The model's own forward calls its head on the hidden states of this rank's tokens. Inside of that call the engine (FSDP,
ZeRO) has gathered the head's weights, so the loss is computed there, chunk by chunk. In the place of logits the head
returns eight probe values. What the model makes of these shows what it does to logits. The gradient of the loss goes
back through them, so that the engine's hooks on the head are called as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import device_of
from triton_sp.errors import UnsupportedModelError
from triton_sp.loss import LogitTransform, head_cross_entropy, liger_fits
from triton_sp.wrappers.install import Installation, replaced

PROBE = (-24.0, -3.0, -0.5, 0.0, 1.0, 8.0, 30.0, 200.0)  # exact in every dtype


def logit_transform(entry: nn.Module) -> LogitTransform:
    """What the configuration says that the model does to its logits; wrappers/losses/head.py holds the model to it."""
    config: Any = entry.config
    config = config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def loss_implementation(installation: Installation) -> str:
    """What computes the loss of a training step, in words for `explain`; empty where there is no head."""
    entry, smoothing = installation.anatomy.entry, installation.config.label_smoothing
    head = getattr(entry, "get_output_embeddings", lambda: None)()
    if installation.anatomy.decoder is None or head is None:
        return ""
    smoothed = f", labels smoothed by {smoothing:g}" if smoothing else ""
    if not installation.config.chunked_loss:
        return "cross entropy over this rank's logits" + smoothed
    if liger_fits(head, device_of(entry), next(entry.parameters()).dtype, logit_transform(entry)):
        return "Liger-Kernel's fused linear cross entropy, without logits" + smoothed
    return "the head and cross entropy, a chunk of this rank's tokens at a time" + smoothed


@dataclass(eq=False)
class HeadLoss:
    """The loss of one call, formed where the model calls its head.

    Attributes:
        targets_T: of this rank's tokens.
    """

    head: nn.Module
    targets_T: Tensor
    transform: LogitTransform
    label_smoothing: float
    share: Tensor | None = None
    wish, remedy = "SPConfig.chunked_loss", "leave out chunked_loss for this model"

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the model runs, its head computes the loss."""
        original: Callable[..., Any] = self.head.forward
        with replaced(self.head, "forward", lambda hidden: self._run(original, hidden)):
            yield

    @torch.compiler.disable(reason="it talks to the engine, and forms the loss chunk by chunk")
    def _run(self, original: Callable[..., Any], hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        if self.share is not None or len(states) != len(self.targets_T):
            self._refuse(
                "a head that is called once, on every token",
                "a second call" if self.share is not None else f"{len(states)} of {len(self.targets_T)} tokens",
            )
        self.share = self.form(states, original)
        return _Ticket.apply(self.share, self.share.new_tensor(PROBE)[None, None])

    def form(self, states: Tensor, original: Callable[..., Any]) -> Tensor:
        """What is wanted in the place of logits, from this rank's hidden states (T, C)."""
        return head_cross_entropy(self.head, states, self.targets_T, self.transform, self.label_smoothing, original)

    def take(self, logits: Tensor, *, check: bool) -> Tensor:
        """What `form` gave, this rank's share of the loss, once the model has returned what its head gave it.

        Args:
            check: whether to read it, which waits for the device: what a model does to its logits does not change.

        Raises:
            UnsupportedModelError: the model did not call its head, or does something else to logits than its
                configuration says.
        """
        if self.share is None:
            self._refuse("a model that calls its output embeddings once", "no call")
        if check:
            probe = torch.tensor(PROBE)
            found = logits.detach().flatten().float().cpu()
            expected = self.transform(probe)
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2):
                shown = ", ".join(f"{x:g} -> {y:g}" for x, y in zip(PROBE[3:6], found[3:6].tolist(), strict=False))
                self._refuse(f"logits that pass {self.transform}, as the configuration says", shown)
        return _Redeem.apply(logits, self.share)  # type: ignore[no-any-return]

    def _refuse(self, expected: str, found: str) -> None:
        raise UnsupportedModelError(
            f"{self.wish}, {type(self.head).__name__}", expected=expected, found=found, remedy=self.remedy
        )


class _Ticket(torch.autograd.Function):
    """What the head returns. It orders the backward: the loss is recomputed only after the gradient of the logits has
    reached the head and the hooks on it."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, probe: Tensor) -> Tensor:
        ctx.shape = share.shape
        return probe.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.new_zeros(ctx.shape), None


class _Redeem(torch.autograd.Function):
    """The share, for what the model returned as its logits; to them goes a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return share.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return torch.zeros_like(logits), grad
