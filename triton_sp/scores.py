"""What a policy is judged by, token by token: the log-probability of a label, the entropy, whether it is the likeliest.

As with the loss, only a chunk of the (tokens x vocabulary) matrix is ever formed, and again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_sp.loss import IGNORE, LogitTransform, chunk_rows


class TokenScores(NamedTuple):
    """Of each label of a batch but the first of a row, (B, S - 1): 0 where the label is -100.

    Attributes:
        log_probs: the logarithm of its probability, in fp32 or wider.
        entropy: of the distribution that it is one of, likewise.
        is_top1: bool, whether it is the likeliest.
        label_mask: bool, whether it is not -100.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    label_mask: Tensor


def head_scores(
    head: Callable[[Tensor], Tensor],
    hidden_TC: Tensor,
    targets_T: Tensor,
    transform: LogitTransform | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(T, 3), in fp32 or wider: log-probability, entropy, 1.0 where the target is the likeliest; 0 without a target.

    Args:
        head: hidden states (T, C) to logits (T, V), token by token; it runs on tokens with a target only.
        transform: what the model does to logits.
        temperature: what they are divided by then.

    >>> scores = head_scores(torch.nn.Identity(), torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1, -100]))
    >>> scores.tolist()[0][:2], scores.tolist()[1]                                     # log 1/2 and log 2; no target
    ([-0.6931471824645996, 0.6931471824645996], [0.0, 0.0, 0.0])
    """
    transform = transform or LogitTransform()

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return _scores(transform(head(hidden)), targets, temperature)

    labelled = targets_T != IGNORE
    hidden, targets = hidden_TC[labelled], targets_T[labelled]
    with torch.no_grad():
        rows = chunk_rows(head(hidden[:0]).shape[-1])
    # A rank without targets has a chunk too, an empty one: engines wait for the gradient of its head.
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    scores = torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks])
    return scores.new_zeros(len(targets_T), 3).masked_scatter(labelled[:, None], scores)


def _scores(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    norm = logits.logsumexp(-1)
    probabilities = (logits - norm[:, None]).exp()
    # Words that are masked by -inf add nothing; 0 times infinity would.
    expected = (probabilities * logits.masked_fill(probabilities == 0, 0)).sum(-1)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    top1 = (chosen >= logits.amax(-1)).to(norm.dtype)
    return torch.stack([chosen - norm, norm - expected, top1.detach()], -1)
