"""The loss stage: each rank computes the cross entropy of its tokens, divided by the label count of the whole batch.

Labels are shifted on the full sequence, which every rank has, because a shard's last token would have no label
otherwise. They are counted there too, because a count on each rank would give ranks with few labels too much weight.

The matrix (tokens x vocabulary) is the largest of most models: for 16k tokens and the 152k words of Qwen it takes 10 GB
in fp32. Only a chunk of it is held in fp32 at a time, and `head_cross_entropy` forms only a chunk of it at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_sp.ops.differentiable import once_differentiable
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group

IGNORE = -100
CHUNK_ELEMENTS = 1 << 26  # how many logits are held in fp32 at a time: 256 MiB
LIGER_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its head: first a scale, then a soft limit.

    Attributes:
        scale: a factor.
        softcap: the limit c of c tanh(x / c); None if there is none.

    >>> LogitTransform(scale=2.0, softcap=3.0)(torch.tensor([0.0, 100.0])).tolist()
    [0.0, 3.0]
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def shift(labels: Tensor) -> Tensor:
    """The target of each position, which is the label of the next one. (B, S) to (B, S); the last is -100.

    >>> shift(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def mean_of_shares(share: Tensor, count: Tensor | float, group: Group, gradient: str) -> Tensor:
    """The sum over ranks of their cross entropies, divided by the label count of the batch.

    Args:
        share: a scalar, the summed cross entropy of this rank's tokens.
        count: the divisor. 0 counts as 1, so a batch without labels has loss 0.
        gradient: "mean" if an engine will average gradients over ranks, "sum" if it will add them.

    Returns:
        A scalar. The mean (or the sum) over ranks of its gradients is the gradient of one process.
    """
    divisor = torch.as_tensor(count, device=share.device, dtype=share.dtype)
    divisor = divisor.masked_fill(divisor == 0, 1)
    share = collectives.scale_gradient(share / divisor, group.size if gradient == "mean" else 1.0)
    return collectives.total_of_shares(share, group)  # not a view: trainers multiply the loss in place


# --- a rank's share ------------------------------------------------------------------------------------------------


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum of the cross entropies of the tokens, computed in fp32 or wider, a chunk at a time.

    Args:
        logits_TV: of a floating dtype and any strides. Their gradient has the same dtype.
        targets_T: int64; -100 is ignored.
        label_smoothing: the weight of the mean over the vocabulary, as in `F.cross_entropy` and transformers'
            `LabelSmoother`.

    >>> round(cross_entropy(torch.zeros(3, 4), torch.tensor([1, 3, -100])).item(), 4)     # 2 log 4
    2.7726
    """
    return _CrossEntropy.apply(logits_TV, targets_T, label_smoothing)  # type: ignore[no-any-return]


def chunk_rows(vocabulary: int) -> int:
    """How many tokens make a chunk of logits."""
    return max(CHUNK_ELEMENTS // max(vocabulary, 1), 1)


def slices(tokens: int, rows: int) -> list[slice]:
    """So many tokens, cut into chunks.

    >>> slices(5, 3)
    [slice(0, 3, None), slice(3, 6, None)]
    """
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits, which the head's caller holds anyway, and one number per token; only chunks are in fp32."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, smoothing: float) -> Tensor:
        tokens, vocabulary = logits_TV.shape
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        norm_T = torch.empty(tokens, dtype=wide, device=logits_TV.device)
        total = torch.zeros((), dtype=wide, device=logits_TV.device)
        for own in slices(tokens, chunk_rows(vocabulary)):
            logits, targets = logits_TV[own].to(wide), targets_T[own]
            norm = norm_T[own] = logits.logsumexp(-1)
            losses = norm - logits.gather(1, targets.masked_fill(targets == IGNORE, 0)[:, None])[:, 0]
            if smoothing:  # not multiplied by 0 otherwise, because words may be masked by -inf
                losses = (1 - smoothing) * losses + smoothing * (norm - logits.mean(-1))
            total += losses.masked_fill(targets == IGNORE, 0).sum()
        ctx.save_for_backward(logits_TV, targets_T, norm_T)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, targets_T, norm_T = ctx.saved_tensors
        vocabulary = logits_TV.shape[1]
        grads_TV = torch.empty_like(logits_TV)
        for own in slices(len(logits_TV), chunk_rows(vocabulary)):
            logits, targets, norm, out = (x[own] for x in (logits_TV, targets_T, norm_T, grads_TV))
            share = (logits.to(norm.dtype) - norm[:, None]).exp_()
            if ctx.smoothing:
                share -= ctx.smoothing / vocabulary
            right = torch.full_like(norm, ctx.smoothing - 1)[:, None]
            share.scatter_add_(1, targets.masked_fill(targets == IGNORE, 0)[:, None], right)
            out.copy_(share.masked_fill_((targets == IGNORE)[:, None], 0).mul_(grad))
        return grads_TV, None, None


def head_cross_entropy(
    head: nn.Module,
    hidden_TC: Tensor,
    targets_T: Tensor,
    transform: LogitTransform | None = None,
    label_smoothing: float = 0.0,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The `cross_entropy` of the logits of a head, of which only a chunk exists at a time, also in the backward.

    The head runs only on tokens that have a target. Liger-Kernel computes this if it is installed and can replace the
    head; it forms gradients in its forward. Otherwise the head runs chunk by chunk, and again in the backward.
    Gradients of a weight are added up over the chunks in the weight's dtype.

    Args:
        head: maps hidden states (T, C) to logits (T, V), token by token.
        hidden_TC: the hidden states of this rank's tokens.
        targets_T: int64; -100 is ignored.
        transform: what the model does to logits.
        label_smoothing: as in `cross_entropy`.
        forward: what to call instead of the head.

    >>> head, hidden, targets = nn.Linear(2, 5), torch.randn(3, 2), torch.tensor([1, 4, -100])
    >>> share = head_cross_entropy(head, hidden, targets)
    >>> torch.testing.assert_close(share, F.cross_entropy(head(hidden), targets, reduction="sum"))
    """
    transform, forward = transform or LogitTransform(), forward or head
    labelled = targets_T != IGNORE
    hidden_TC, targets_T = hidden_TC[labelled], targets_T[labelled]
    # Without tokens Liger divides by 0. If hidden states need no gradient it leaves out the gradient of the weight.
    usable = len(hidden_TC) and hidden_TC.requires_grad
    if usable and liger_fits(head, hidden_TC.device, hidden_TC.dtype, transform):
        return _by_liger(head, hidden_TC, targets_T, label_smoothing)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(transform(forward(hidden)), targets, label_smoothing)

    return torch.stack(in_chunks(part, forward, hidden_TC, targets_T)).sum()


def in_chunks(
    part: Callable[[Tensor, Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    hidden_TC: Tensor,
    targets_T: Tensor,
) -> list[Tensor]:
    """`part(hidden, targets)` of one chunk of the tokens after another, each of which is run again in the backward.

    Args:
        part: calls the head.
        head: gives the number of logits that a token has.
    """
    with torch.no_grad():
        rows = chunk_rows(head(hidden_TC[:0]).shape[-1])
    # A rank without targets has an empty chunk, because engines wait for the gradient of its head.
    chunks = zip(hidden_TC.split(rows), targets_T.split(rows), strict=True)
    return [checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]


def liger_installed() -> bool:
    """Whether Liger-Kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def liger_fits(head: nn.Module, device: torch.device, dtype: torch.dtype, transform: LogitTransform) -> bool:
    """Whether Liger-Kernel's fused linear cross entropy is installed and can replace a head.

    The head must be a plain linear layer on a GPU, in a dtype that Liger knows, and the model must use its logits as
    they are.
    """
    return (
        liger_installed()
        and device.type in LIGER_DEVICES
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, Tensor)  # not a DTensor, and not quantised
        and transform == LogitTransform()
    )


def _by_liger(head: Any, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
    return loss(head.weight, hidden, targets, head.bias)
