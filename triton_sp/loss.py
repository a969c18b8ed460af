"""The loss stage: each rank its tokens' share of the cross entropy, divided by the count of the whole batch.

Shifting labels on a shard would pair its last token with nothing, and dividing by a local count would weigh ranks by
their number of labels; both are done on the full sequence, which every rank has.

(tokens x vocabulary) is the largest matrix of most models: 16k tokens of Qwen's 152k words are 10 GB in fp32. Only a
chunk of it is ever held in fp32, and with `head_cross_entropy` only a chunk of it is ever formed.
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
CHUNK_ELEMENTS = 1 << 26  # logits that are in fp32 at a time: 256 MiB
LIGER_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits that its head gives: a scale, then a soft limit.

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
    """The target of each position: the label of the next. (B, S) -> (B, S).

    >>> shift(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def sharded_cross_entropy(
    logits_TV: Tensor,
    targets_T: Tensor,
    count: Tensor | float,
    group: Group,
    gradient: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The batch's mean cross entropy, equal on every rank, from this rank's tokens.

    Args:
        logits_TV: this rank's logits; computed on in fp32 or wider, a chunk at a time.
        targets_T: their targets, -100 to ignore.
        count, gradient: see `mean_of_shares`.
        label_smoothing: see `cross_entropy`.
    """
    return mean_of_shares(cross_entropy(logits_TV, targets_T, label_smoothing), count, group, gradient)


def mean_of_shares(share: Tensor, count: Tensor | float, group: Group, gradient: str) -> Tensor:
    """What the ranks' summed cross entropies come to together, divided by the count of the batch.

    Args:
        share: scalar, this rank's.
        count: what the sum over all ranks is divided by; 0 counts as 1, so a batch without labels has loss 0.
        gradient: "mean" if an engine will average gradients over ranks, "sum" if it will add them.

    Returns:
        A scalar. The mean (or sum) over ranks of the gradients that flow from it is the single-process gradient.
    """
    divisor = torch.as_tensor(count, device=share.device, dtype=share.dtype).clamp(min=1)
    share = collectives.scale_gradient(share / divisor, group.size if gradient == "mean" else 1.0)
    return collectives.total_of_shares(share, group)  # not a view: trainers multiply the loss in place


# --- a rank's share ------------------------------------------------------------------------------------------------


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum of the tokens' cross entropies, in fp32 or wider, of which only a chunk is held at a time.

    Args:
        logits_TV: floating, of any strides; their gradient has their dtype.
        targets_T: int64, -100 to ignore.
        label_smoothing: the weight of the mean over the vocabulary, as `F.cross_entropy` and transformers'
            `LabelSmoother` have it.

    >>> round(cross_entropy(torch.zeros(3, 4), torch.tensor([1, 3, -100])).item(), 4)     # 2 log 4
    2.7726
    """
    return _CrossEntropy.apply(logits_TV, targets_T, label_smoothing)  # type: ignore[no-any-return]


def chunk_rows(vocabulary: int) -> int:
    return max(CHUNK_ELEMENTS // max(vocabulary, 1), 1)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits, which their maker holds anyway, and a number a token; fp32 exists by chunks of rows."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, smoothing: float) -> Tensor:
        tokens, vocabulary = logits_TV.shape
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        norm_T = torch.empty(tokens, dtype=wide, device=logits_TV.device)
        total = torch.zeros((), dtype=wide, device=logits_TV.device)
        step = chunk_rows(vocabulary)
        for own in (slice(start, start + step) for start in range(0, tokens, step)):
            logits, targets = logits_TV[own].to(wide), targets_T[own]
            norm = norm_T[own] = logits.logsumexp(-1)
            losses = norm - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            if smoothing:  # not multiplied by 0 otherwise: words may be masked by -inf
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
        chunks = (x.split(chunk_rows(vocabulary)) for x in (logits_TV, targets_T, norm_T, grads_TV))
        for logits, targets, norm, out in zip(*chunks, strict=True):
            share = (logits.to(norm.dtype) - norm[:, None]).exp_()
            if ctx.smoothing:
                share -= ctx.smoothing / vocabulary
            right = torch.full_like(norm, ctx.smoothing - 1)[:, None]
            share.scatter_add_(1, targets.clamp(min=0)[:, None], right)
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
    """`cross_entropy` of a head's logits, of which never more than a chunk exists, in the backward too.

    The head runs on tokens with a target only. By Liger-Kernel where it is installed and can stand for the head, which
    forms gradients in its forward; else chunk by chunk, and again in the backward. Gradients of a weight are added up
    over the chunks in its own dtype.

    Args:
        head: hidden states (T, C) to logits (T, V), token by token.
        transform: what the model does to logits.
        forward: what to call in the place of the head.

    >>> head, hidden, targets = nn.Linear(2, 5), torch.randn(3, 2), torch.tensor([1, 4, -100])
    >>> share = head_cross_entropy(head, hidden, targets)
    >>> torch.testing.assert_close(share, F.cross_entropy(head(hidden), targets, reduction="sum"))
    """
    transform, forward = transform or LogitTransform(), forward or head
    labelled = targets_T != IGNORE
    hidden_TC, targets_T = hidden_TC[labelled], targets_T[labelled]
    # Without tokens Liger divides by 0; where hidden states need no gradient it leaves out the weight's.
    usable = len(hidden_TC) and hidden_TC.requires_grad
    if usable and liger_fits(head, hidden_TC.device, hidden_TC.dtype, transform):
        return _by_liger(head, hidden_TC, targets_T, label_smoothing)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(transform(forward(hidden)), targets, label_smoothing)

    with torch.no_grad():
        rows = chunk_rows(forward(hidden_TC[:0]).shape[-1])
    # A rank without targets has a chunk too, an empty one: engines wait for the gradient of its head.
    chunks = zip(hidden_TC.split(rows), targets_T.split(rows), strict=True)
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def liger_fits(head: nn.Module, device: torch.device, dtype: torch.dtype, transform: LogitTransform) -> bool:
    """Whether Liger-Kernel's fused linear cross entropy is there and can stand for a head: a plain linear layer on a
    GPU, whose logits are the model's, in a dtype that it knows."""
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
