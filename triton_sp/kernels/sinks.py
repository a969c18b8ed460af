"""Learned sinks (gpt-oss, arXiv:2508.10925): to every row of a head one more key, with a learned score and no value.

It takes a part of the softmax and gives nothing. Out and the log-sum-exp know of it, so the gradients of q, k and v
follow from these as they do without a sink; only its own gradient is one more sum.
"""

import torch
from torch import Tensor


def sink_gradient(sinks: Tensor, lse_HT: Tensor, delta_HT: Tensor) -> Tensor:
    """The gradient of the sinks (H,), from the log-sum-exp and delta = rowsum(dout * out) - dlse of each row.

    As for any key ds = p (dout v - delta), here with v = 0 and p = exp(sink - lse). Rows that saw nothing, not even the
    sink, have lse = -inf, and whatever delta.

    >>> sink_gradient(torch.zeros(1), torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.25, torch.nan]])).tolist()
    [-0.25]
    """
    weights = torch.exp(sinks.to(lse_HT.dtype)[:, None] - lse_HT)
    return -torch.where(lse_HT == -torch.inf, 0.0, weights * delta_HT).sum(1)
