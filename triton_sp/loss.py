"""The loss stage: each rank its tokens' share of the cross entropy, divided by the count of the whole batch.

Shifting labels on a shard would pair its last token with nothing, and dividing by a local count would weigh ranks by
their number of labels; both are done on the full sequence, which every rank has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp import comm
from triton_sp.comm import Group

IGNORE = -100


def shift(labels: Tensor) -> Tensor:
    """The target of each position: the label of the next. (B, S) -> (B, S).

    >>> shift(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def sharded_cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, count: Tensor | float, group: Group, gradient: str
) -> Tensor:
    """The batch's mean cross entropy, equal on every rank, from this rank's tokens.

    Args:
        logits_TV: this rank's logits; computed on in fp32 or wider.
        targets_T: their targets, -100 to ignore.
        count: what the sum over all ranks is divided by; 0 counts as 1, so a batch without labels has loss 0.
        gradient: "mean" if an engine will average gradients over ranks, "sum" if it will add them.

    Returns:
        A scalar. The mean (or sum) over ranks of the gradients that flow from it is the single-process gradient.
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    share = F.cross_entropy(logits_TV.to(wide), targets_T, ignore_index=IGNORE, reduction="sum")
    divisor = torch.as_tensor(count, device=share.device, dtype=wide).clamp(min=1)
    total = comm.total_of_shares(share / divisor, group)
    return comm.scale_gradient(total, group.size if gradient == "mean" else 1.0)
