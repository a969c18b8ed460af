"""SPConfig: how a model is wrapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from triton_sp.errors import InputError, require

_FIX = "correct the argument"


@dataclass(frozen=True)
class SPConfig:
    """How a model is wrapped.

    Attributes:
        gradient: what will combine the ranks' gradients. "mean" for engines that average over ranks (DDP, FSDP, ZeRO
            and `sync_gradients`), "sum" for those that add. "auto" is "mean", but with DeepSpeed's own mpu the choice
            is yours, see mpu.py.
        gather_logits: whether `out.logits` (without a head: `out.last_hidden_state`) holds all tokens, (B, S, V) with
            0 at padding, instead of this rank's, (1, T, V).
        chunked_loss: whether a training step with labels leaves `out.logits` None and forms its loss from a chunk of
            logits at a time: (tokens, vocabulary) never exists. Liger-Kernel's kernel does it where it is installed
            and the head is a plain linear layer on a GPU; `explain` says.
        label_smoothing: of the loss, as transformers' LabelSmoother has it. (That one needs all logits on every rank:
            `gather_logits`.)
        check: "always" compares the ranks' inputs before each forward, so that a difference raises on all of them.
            "first" does so for the first batch of each kind (shapes, settings, plan), and only compares the kind of
            later ones: other ids, labels or pixels of the same shape go unnoticed. "off" trusts the caller.
        plan: "auto" takes what the cost model finds fastest for each stream, see cost.py. "heads", "segments" and, for
            vision towers, "replicate" ask for one; where it is not possible "auto" decides.
        recurrence: how recurrent layers (gated delta nets, state space models) are shared out: "auto" takes what the
            cost model finds fastest; "states" or "heads" ask for one, see plan/recurrence.py.
        chunks: in how many parts heads are exchanged, if they divide: one travels while another is attended to, and
            buffers are the smaller. Worth it where the exchange is long; short ones only multiply.
        link: what the cost model reckons with: "nvlink", "pcie", "gloo", or "auto" for what `triton-sp calibrate` has
            measured on this machine, else "gloo" on CPUs and "nvlink" on GPUs.

    >>> SPConfig(gradient="sum").gather_logits
    False
    """

    gradient: Literal["auto", "mean", "sum"] = "auto"
    gather_logits: bool = False
    chunked_loss: bool = False
    label_smoothing: float = 0.0
    check: Literal["always", "first", "off"] = "always"
    plan: Literal["auto", "heads", "segments", "replicate"] = "auto"
    link: Literal["auto", "nvlink", "pcie", "gloo"] = "auto"
    recurrence: Literal["auto", "states", "heads"] = "auto"
    chunks: int = 1

    def __post_init__(self) -> None:
        """Raise an InputError for a setting that is none of the allowed ones."""
        for name, kind in get_type_hints(type(self)).items():
            found, allowed = getattr(self, name), get_args(kind)
            require(
                not allowed or found in allowed, InputError, f"SPConfig.{name}", f"one of {allowed}", repr(found), _FIX
            )
        for name, fits, expected in (
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1"),
            ("chunks", isinstance(self.chunks, int) and self.chunks >= 1, "1 or more"),
        ):
            require(fits, InputError, f"SPConfig.{name}", expected, repr(getattr(self, name)), _FIX)
