"""Attention by the textbook in wide numbers, with how far rounding can take a right result from it.

For the proof at run time (`SPConfig(verify=...)`). It shares no code with what it is compared with, but for the meaning
of a mask. The bounds follow the rounding of a kernel step by step: in each sum over keys the terms are taken by their
absolute values, so that a bound is large only where numbers cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask, States
from triton_sp.ops.attend_cpu import visible_keys

_SCORES = 1 << 24  # numbers of a block of scores
# What rounding to the dtype of q can do to a number, in its eps; one rounding is half of it. Forward: weights, out, and
# out again where sinks shrink it. Backward: these three, by way of out; the gradient of scores, the part that another
# rank adds, and the sum.
_FORWARD, _BACKWARD = 1.5, 3.0
_MATMUL = {"highest": torch.finfo(torch.float32).eps, "high": 2.0**-10, "medium": 2.0**-7}


class Bounded(NamedTuple):
    """What is exact, and by how much a right result may differ from it, number by number."""

    exact: Tensor
    bound: Tensor


class Formula(NamedTuple):
    """What is computed beside the mask: see `varlen_attention`."""

    softmax_scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


def attend(states: States, mask: Mask, formula: Formula) -> Bounded:
    """out (T, H, V), as `varlen_attention` defines it.

    Args:
        states: q (T, H, D), k (S, K, D), v (S, K, V), in the dtype that the bound is for.

    >>> from triton_sp.kernels.mask import Mask
    >>> q, v = torch.zeros(2, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1)
    >>> attend((q, q, v), Mask(torch.tensor([0, 2])), Formula(1.0)).exact.flatten().tolist()
    [2.0, 2.0]
    """
    q, _, v = states
    shape = (*q.shape[:2], v.shape[2])
    out, bound = (torch.zeros(shape, dtype=_wide(q), device=q.device) for _ in range(2))
    for block in _blocks(states, mask, formula):
        out[block.rows] = block.by_head(block.weights @ block.v)
        bound[block.rows] = block.by_head(block.loose(_FORWARD) @ block.v.abs()) + block.least
    return Bounded(out, bound)


def attend_backward(states: States, dout: Tensor, mask: Mask, formula: Formula) -> tuple[Bounded, Bounded, Bounded]:
    """dq, dk and dv, from the gradient of out (T, H, V)."""
    grads = [Bounded(*(torch.zeros(x.shape, dtype=_wide(x), device=x.device) for _ in range(2))) for x in states]
    for block in _blocks(states, mask, formula):
        dout_KRV = block.by_kv_head(dout)
        out, out_bound = block.weights @ block.v, block.weights @ block.v.abs()
        through = dout_KRV @ block.v.mT - (dout_KRV * out).sum(-1, keepdim=True)
        dscores = block.weights * block.slope * through
        through = dout_KRV.abs() @ block.v.abs().mT + (dout_KRV.abs() * out_bound).sum(-1, keepdim=True)
        loose = block.loose(_BACKWARD)
        moved = loose * block.slope.abs() * through + block.least
        grads[0].exact[block.rows] = block.by_head(dscores @ block.k)
        grads[0].bound[block.rows] = block.by_head(moved @ block.k.abs()) + block.least
        for grad, exact, bound in (
            (grads[1], dscores.mT @ block.q, moved.mT @ block.q.abs()),
            (grads[2], block.weights.mT @ dout_KRV, loose.mT @ dout_KRV.abs()),
        ):
            grad.exact[block.keys] += exact.transpose(0, 1)
            grad.bound[block.keys] += bound.transpose(0, 1) + block.least
    return grads[0], grads[1], grads[2]


class _Block(NamedTuple):
    """Some rows of one segment in all heads. In tensors the rows of the query heads of a key/value head follow one
    another: R = (H / K) * rows.

    Attributes:
        q, k, v: (K, R, D), (K, L, D) and (K, L, V), wide.
        weights: (K, R, L), of the softmax.
        slope: (K, R, L) or a number: the derivative of scores by the products of q and k.
        slack: (K, R, 1), the error of a weight, and of a sum over keys, relative to the sum of its terms.
        least: the distance of the smallest numbers of the dtype.
    """

    rows: slice
    keys: slice
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    slope: Tensor
    slack: Tensor
    least: float

    def loose(self, roundings: float) -> Tensor:
        """How far weights, (K, R, L), may be off."""
        return self.weights * (roundings * self.slack) + self.least

    def by_head(self, x: Tensor) -> Tensor:
        """(K, R, D) -> (rows, H, D)."""
        return x.unflatten(1, (-1, self.rows.stop - self.rows.start)).flatten(0, 1).transpose(0, 1)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """The rows of (T, H, D) as (K, R, D), wide."""
        return _by_kv_head(x[self.rows], len(self.k))


def _blocks(states: States, mask: Mask, formula: Formula) -> Iterator[_Block]:
    q_THD, k_SKD, v_SKV = states
    starts, key_starts, used = (None if table is None else table.tolist() for table in mask.tables[:3])
    assert starts is not None and key_starts is not None
    for i, ((begin, end), (first, last)) in enumerate(zip(pairwise(starts), pairwise(key_starts), strict=True)):
        keys = slice(first, last if used is None else first + used[i])
        if begin == end or keys.stop == keys.start:
            continue
        k, v = (x[keys].transpose(0, 1).to(_wide(x)) for x in (k_SKD, v_SKV))
        seen = _seen(mask, slice(begin, end), keys, q_THD.device)
        size = max(1, _SCORES // (q_THD.shape[1] * (keys.stop - keys.start)))
        for start in range(begin, end, size):
            rows = slice(start, min(start + size, end))
            q = _by_kv_head(q_THD[rows], len(k))
            weights, slope = _weights(q, k, seen[:, rows.start - begin : rows.stop - begin], formula)
            info = torch.finfo(q_THD.dtype)
            slack = _slack(q, k, q_THD.dtype, formula)
            yield _Block(rows, keys, q, k, v, weights, slope, slack, info.smallest_normal * info.eps)


def _seen(mask: Mask, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """(2, rows), the first of the keys that each row sees and the one past its last."""
    if mask.key_ranges is not None:
        return mask.key_ranges[:, rows] - keys.start
    counts = rows.stop - rows.start, keys.stop - keys.start
    return visible_keys(*counts, causal=mask.causal, window=mask.window, device=device)


def _weights(q: Tensor, k: Tensor, seen: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    heads_of_one = q.shape[1] // seen.shape[1]
    scores = q @ k.mT * formula.softmax_scale
    slope = scores.new_tensor(formula.softmax_scale)
    if formula.softcap:
        capped = torch.tanh(scores / formula.softcap)
        scores, slope = formula.softcap * capped, formula.softmax_scale * (1 - capped.square())
    (first, stop), key = seen[..., None], torch.arange(k.shape[1], device=k.device)
    scores = scores.masked_fill(~((key >= first) & (key < stop)).repeat(heads_of_one, 1), -math.inf)
    top = torch.logsumexp(scores, -1, keepdim=True)
    if formula.sinks is not None:
        sinks = formula.sinks.to(scores.dtype).view(len(k), -1, 1).expand(-1, -1, seen.shape[1]).reshape(len(k), -1, 1)
        top = torch.logaddexp(top, sinks)
    return torch.exp(scores - top.masked_fill(top == -math.inf, 0.0)), slope


def _slack(q: Tensor, k: Tensor, dtype: torch.dtype, formula: Formula) -> Tensor:
    """One rounding to the dtype, and what sums in fp32 add: of D products in a score, which enters by its exponential,
    and of L keys. Errors of sums grow like the root of the number of their terms (Higham and Mary, 2019)."""
    matmul = torch.finfo(dtype).eps if dtype == torch.float64 else _MATMUL[torch.get_float32_matmul_precision()]
    if dtype.itemsize == 2:  # products of such numbers are exact in fp32
        matmul = _MATMUL["highest"]
    largest = formula.softmax_scale * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).amax(-1)[:, None, None]
    return torch.finfo(dtype).eps + matmul * (2 * math.sqrt(q.shape[-1]) * largest + math.sqrt(k.shape[1]))


def _by_kv_head(x_RHD: Tensor, kv_heads: int) -> Tensor:
    return x_RHD.to(_wide(x_RHD)).transpose(0, 1).unflatten(0, (kv_heads, -1)).flatten(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    """fp32 for numbers of 16 bits, whose products it holds exactly, and fp64 for fp32."""
    return torch.float32 if x.dtype.itemsize == 2 else torch.float64
