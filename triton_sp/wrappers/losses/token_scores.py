"""The scores of tokens, formed where a model calls its head. Only a chunk of (tokens x vocabulary) is ever formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.loss import IGNORE, LogitTransform, in_chunks
from triton_sp.wrappers.losses.head import HeadLoss, logit_transform


@dataclass(eq=False)
class HeadScores(HeadLoss):
    """The scores of one call, formed where the model calls its head: `take` returns them, (T, 3)."""

    temperature: float = 1.0
    wish, remedy = "log_probs", "take SPConfig(gather_logits=True), and form them of out.logits"

    @classmethod
    def of(cls, entry: nn.Module, targets_T: Tensor, temperature: float) -> HeadScores:
        """For one call of a model, with this rank's targets."""
        model: Any = entry
        return cls(model.get_output_embeddings(), targets_T, logit_transform(entry), 0.0, temperature=temperature)

    def form(self, states: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The scores (T, 3) of this rank's tokens."""
        return head_scores(original, states, self.targets_T, self.transform, self.temperature)


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
    scores = torch.cat(in_chunks(part, head, hidden, targets))
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
