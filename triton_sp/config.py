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
        gradient: how the ranks' gradients will be combined. "mean" is for engines that average over ranks (DDP, FSDP,
            ZeRO and `sync_gradients`), "sum" for engines that add. "auto" is "mean"; only with DeepSpeed's own mpu you
            have to say which, see mpu.py.
        gather_logits: True makes `out.logits` (of a model without a head, `out.last_hidden_state`) hold all tokens,
            (B, S, V) with 0 at padding, instead of the tokens of this rank, (1, T, V).
        chunked_loss: True makes a training step with labels compute its loss from a chunk of logits at a time, so that
            (tokens, vocabulary) never exists; `out.logits` is None then. Liger-Kernel computes it if it is installed
            and the head is a plain linear layer on a GPU; `explain` says what does.
        label_smoothing: the smoothing of the loss, from 0 to 1, by the formula of transformers' LabelSmoother. (The
            LabelSmoother itself needs all logits on every rank, see `gather_logits`.)
        check: "always" compares the inputs of all ranks before each forward, so that a difference raises on all of
            them. "first" does this for the first batch of each kind (shapes, settings, plan) and compares only the kind
            of later batches; other ids, labels or pixels of the same shape are not noticed. "off" compares nothing.
        trial: "first" compares a model that is accepted by its structure alone (see `explain`) with the unsharded model
            before the first batch of each kind, by two forwards without gradients. One of them runs all tokens on every
            rank: let a first batch be short. "off" trusts the structure. The rotary embeddings of a layer are done
            where q and k are packed if a trial in the first forward finds that to be the same; with "off" never.
        plan: "auto" uses the plan that the cost model finds fastest for each stream, see cost.py. "heads", "segments"
            and (for vision towers) "replicate" force a plan; if it is not possible for a stream, "auto" decides.
        recurrence: how recurrent layers (gated delta nets, state space models) are divided among ranks. "auto" uses
            what the cost model finds fastest; "states" and "heads" force one, see plan/recurrence.py.
        chunks: in how many parts heads are exchanged, if they divide. One part travels while another is attended to,
            and buffers are smaller. This helps if exchanges are long; short exchanges only become more.
        heartbeat: seconds. A rank that waits for others on the CPU looks whether they are alive: one that has given no
            sign of life for so long has stopped, one that is alive and has not come for ten times as long has left.
            Then all ranks that wait raise. 0 leaves it to the time-out of the process group, half an hour.
        tiled_mlp: so many tokens at a time the MLPs of all layers work on, and again in the backward, so that what is
            as wide as an MLP is never as long as the shard. 0 does not tile. 4096 is a good size.
        offload: True keeps in CPU memory what the layers keep for the backward. Use it with gradient checkpointing,
            where that is a tensor of hidden states a layer; without, all activations move.
        shard_prefill: True lets `generate` run the prompt sharded. All ranks of the group must call it together then,
            with the same arguments and random seed. False lets each rank generate by itself, unsharded, perhaps alone.
        verify: every so many forwards one layer's attention, and its gradient, is computed once more, whole, on one
            rank, and compared: over all layers in turn. A difference that rounding does not explain raises a
            VerificationError on every rank. 0 never does this, and costs nothing. For new hardware and new kernels.
        single: True wraps a group of one rank too, which `wrap` leaves as it is otherwise: the model then runs on
            packed tokens without padding, with the attention kernels of this library.
        attention: what attends. "triton": the kernels of this library. "torch" (FlashAttention 2 as PyTorch has it),
            "cudnn", "flash_attention_2" and "flash_attention_3" (installed, or through the `kernels` package) take the
            place of these in the forward and the backward, where they take a call; `explain` tells what ran. "auto"
            uses one of them where `triton-sp calibrate` has found it correct and at least 10 % faster on this machine.
        link: what the cost model assumes: "nvlink", "pcie" or "gloo". "auto" uses what `triton-sp calibrate` has
            measured on this machine, or else "gloo" on CPUs and "nvlink" on GPUs.

    >>> SPConfig(gradient="sum").gather_logits
    False
    """

    gradient: Literal["auto", "mean", "sum"] = "auto"
    gather_logits: bool = False
    chunked_loss: bool = False
    label_smoothing: float = 0.0
    check: Literal["always", "first", "off"] = "always"
    trial: Literal["first", "off"] = "first"
    plan: Literal["auto", "heads", "segments", "replicate"] = "auto"
    link: Literal["auto", "nvlink", "pcie", "gloo"] = "auto"
    recurrence: Literal["auto", "states", "heads"] = "auto"
    chunks: int = 1
    heartbeat: float = 60.0
    tiled_mlp: int = 0
    offload: bool = False
    shard_prefill: bool = False
    verify: int = 0
    single: bool = False
    attention: Literal["triton", "auto", "torch", "cudnn", "flash_attention_2", "flash_attention_3"] = "triton"

    def __post_init__(self) -> None:
        """Raise an InputError for a setting that is none of the allowed ones."""
        for name, kind in get_type_hints(type(self)).items():
            found, allowed = getattr(self, name), get_args(kind)
            require(
                not allowed or found in allowed, InputError, f"SPConfig.{name}", f"one of {allowed}", repr(found), _FIX
            )
        for name, fits, expected in (
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1"),
            (
                "heartbeat",
                isinstance(self.heartbeat, int | float) and 0 <= self.heartbeat <= 1e6,
                "seconds, 0 for none",
            ),
            ("verify", type(self.verify) is int and self.verify >= 0, "a number of forwards, 0 for never"),
            ("tiled_mlp", isinstance(self.tiled_mlp, int) and self.tiled_mlp >= 0, "tokens of a tile, 0 for none"),
            ("chunks", isinstance(self.chunks, int) and self.chunks >= 1, "1 or more"),
        ):
            require(fits, InputError, f"SPConfig.{name}", expected, repr(getattr(self, name)), _FIX)
