"""The stage attend in eager PyTorch: the oracle that the kernels are tested against, and the CPU path.

The CPU path keeps the kernels' contract: it is given no graph, returns out and the log-sum-exp in O(T) memory, and has
its own backward. Where SDPA can express the mask it runs what SDPA runs on CPUs, else the textbook formula by rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp.kernels.mask import Grads, Mask, States
from triton_sp.kernels.sinks import sink_gradient


def visible_keys(rows: int, keys: int, *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """The first key that each row of one segment sees, and the one past its last: (2, rows).

    The last row is aligned with the last key (bottom-right), as in FlashAttention >= 2.1. `window` counts the keys a
    row may see behind and including its own position; without `causal` it reaches as far ahead as behind.

    >>> visible_keys(2, 3, causal=True, window=2, device=torch.device("cpu")).tolist()
    [[0, 1], [2, 3]]
    """
    own = torch.arange(rows, device=device) + (keys - rows)
    first = torch.zeros_like(own) if window is None else own - window + 1
    stop = torch.full_like(own, keys)
    if causal:
        stop = own + 1
    elif window is not None:
        stop = own + window
    return torch.stack([first, stop]).clamp(0, keys)


def attend_exactly(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: attention inside each segment by the textbook formula in fp32 or wider, differentiable by autograd.

    Returns out (T, H, D) in the dtype of q, and the log-sum-exp (H, T) in fp32 or wider; see `varlen_attention`.
    """
    outs, lses = [], []
    for segment in _segments(q_THD, k_TKD, mask):
        q, k, v = segment.states(q_THD, k_TKD, v_TKD)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        q, k, v = (x.to(_wide(q)).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_seen(segment.visible(mask, q_THD.device), k.shape[1]), -math.inf)
        with_sink = scores if sinks is None else torch.cat([scores, _column(sinks, scores)], -1)
        lse = torch.logsumexp(with_sink, -1)
        # A row without any key has lse = -inf; its probabilities are 0 by definition, not exp(-inf + inf).
        weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        outs.append((weights @ v).transpose(0, 1).to(q_THD.dtype))
        lses.append(lse)
    slack = len(q_THD) - int(mask.cu_seqlens_q[-1])
    outs.append(q_THD.new_zeros(slack, q_THD.shape[1], v_TKD.shape[2]))
    lses.append(torch.full((q_THD.shape[1], slack), -math.inf, dtype=_wide(q_THD), device=q_THD.device))
    return torch.cat(outs), torch.cat(lses, 1)


# --- attention on the CPU: the kernels' contract, in O(T) memory -----------------------------------------------------

_SHORT = 256  # rows and keys of a segment that is computed together with others
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, out and the log-sum-exp
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what SDPA runs on CPUs
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and the log-sum-exp (H, T), without a gradient: what `attend_backward` needs of the forward."""
    q_THD, k_TKD, v_TKD = (x.detach() for x in (q_THD, k_TKD, v_TKD))
    out = q_THD.new_zeros(*q_THD.shape[:2], v_TKD.shape[2])
    lse = torch.full((q_THD.shape[1], len(q_THD)), -math.inf, dtype=_wide(q_THD), device=q_THD.device)
    for alike in _alike(_segments(q_THD, k_TKD, mask), mask, softcap):
        if alike[0].plain(mask, softcap):
            at, keys = _places([segment.rows for segment in alike]), _places([segment.keys for segment in alike])
            q, k, v = (_stacked(x, where, len(alike)) for x, where in ((q_THD, at), (k_TKD, keys), (v_TKD, keys)))
            found, found_lse = _FLASH(*_heads_first(q, k, v), 0.0, mask.causal, scale=softmax_scale)
            out[at], lse[:, at] = _tokens_first(found)[..., : v.shape[3]], found_lse.transpose(0, 1).flatten(1)
            continue
        (segment,) = alike
        q, k, v = segment.states(q_THD, k_TKD, v_TKD)
        own, own_lse = out[segment.rows.start : segment.rows.stop], lse[:, segment.rows.start : segment.rows.stop]
        visible = segment.visible(mask, q.device)
        for rows in _blocks(q):
            scores, _ = _scores(q[rows], k, visible[:, rows], softmax_scale, softcap)
            top = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0)[..., None])
            own[rows] = (weights @ _per_key_head(v)).flatten(0, 1).transpose(0, 1).to(q.dtype)
            own_lse[:, rows] = top.flatten(0, 1)
    if sinks is not None:
        covered = slice(0, int(mask.cu_seqlens_q[-1]))
        _add_sinks(out[covered], lse[:, covered], sinks.detach())
    return out, lse


def _add_sinks(out: Tensor, lse_HR: Tensor, sinks: Tensor) -> None:
    """A key of no value beside the others: the sum of exponentials grows, out shrinks as much."""
    with_sinks = torch.logaddexp(lse_HR, sinks.to(lse_HR.dtype)[:, None])
    out.mul_(torch.exp(lse_HR - with_sinks).T[..., None])
    lse_HR.copy_(with_sinks)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    states: Five,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    grads: States | None = None,
) -> Grads:
    """The gradients of `attend`, whose q, k, v and results are `states`; in `grads` where these are given."""
    states = tuple(x.detach() for x in states)  # type: ignore[assignment]
    grads = grads or tuple(torch.empty_like(x) for x in states[:3])  # type: ignore[assignment]
    assert grads is not None
    for grad in grads:
        grad.zero_()
    factors = _Factors(softmax_scale, softcap)
    for alike in _alike(_segments(states[0], states[1], mask), mask, softcap):
        if alike[0].plain(mask, softcap) and dlse is None:
            _backward_by_sdpa(dout, states, alike, mask, factors, grads)
            continue
        for segment in alike:
            _backward_by_rows(dout, dlse, states, segment, mask, factors, grads)
    if sinks is None:
        return Grads(*grads)
    out, lse_HT = states[3:]
    delta_HT = (dout.to(lse_HT.dtype) * out.to(lse_HT.dtype)).sum(-1).T
    return Grads(*grads, sink_gradient(sinks.detach(), lse_HT, delta_HT if dlse is None else delta_HT - dlse))


class _Factors(NamedTuple):
    softmax_scale: float
    softcap: float


def _backward_by_sdpa(
    dout: Tensor, states: Five, alike: list[_Segment], mask: Mask, factors: _Factors, grads: States
) -> None:
    (q, k, v, out, lse), count = states, len(alike)
    at, keys = _places([segment.rows for segment in alike]), _places([segment.keys for segment in alike])
    group = q.shape[1] // k.shape[1]
    places = ((dout, at), (q, at), (out, at), (k, keys), (v, keys))
    dout_NHRD, q_NHRD, out_NHRD, *kv = _heads_first(*(_stacked(x, where, count) for x, where in places))
    k_NHLD, v_NHLD = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in kv)
    own_lse = lse[:, at].unflatten(1, (count, -1)).transpose(0, 1)
    given = dout_NHRD, q_NHRD, k_NHLD, v_NHLD, out_NHRD, own_lse
    found = _FLASH_BACKWARD(*given, 0.0, mask.causal, scale=factors.softmax_scale)
    grads[0][at] = _tokens_first(found[0])[..., : q.shape[2]]
    for grad, part in zip(grads[1:], found[1:], strict=True):
        summed = part if group == 1 else part.unflatten(1, (-1, group)).sum(2)
        grad[keys] = _tokens_first(summed)[..., : grad.shape[2]]


def _backward_by_rows(
    dout: Tensor, dlse: Tensor | None, states: Five, segment: _Segment, mask: Mask, factors: _Factors, grads: States
) -> None:
    q, k, v = segment.states(*states[:3])
    dq, dk, dv = segment.states(*grads)
    heads, visible = k.shape[1], segment.visible(mask, q.device)
    dk_KLD, dv_KLD = (torch.zeros_like(_per_key_head(x)[:, 0]) for x in (k, v))
    for rows in _blocks(q):
        at = slice(segment.rows.start + rows.start, segment.rows.start + rows.stop)
        scores, slope = _scores(q[rows], k, visible[:, rows], *factors)
        dout_KGRD, out_KGRD = (_grouped(x[at], heads) for x in (dout, states[3]))
        lse_KGR = states[4][:, at].unflatten(0, (heads, -1))
        weights = torch.exp(scores - lse_KGR.masked_fill(lse_KGR == -math.inf, 0.0)[..., None])
        delta = (dout_KGRD * out_KGRD).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, at].unflatten(0, (heads, -1))
        dscores = weights * (dout_KGRD @ _per_key_head(v).transpose(-1, -2) - delta[..., None])
        dscores = dscores * (factors.softmax_scale if slope is None else factors.softmax_scale * slope)
        dq[rows] = (dscores @ _per_key_head(k)).flatten(0, 1).transpose(0, 1).to(q.dtype)
        dk_KLD += torch.einsum("kgrl,kgrd->kld", dscores, _grouped(q[rows], heads))
        dv_KLD += torch.einsum("kgrl,kgrd->kld", weights, dout_KGRD)
    dk.copy_(dk_KLD.transpose(0, 1))
    dv.copy_(dv_KLD.transpose(0, 1))


@dataclass(frozen=True)
class _Segment:
    """The rows of a segment, and the keys of it that count."""

    rows: range
    keys: range

    def states(self, q: Tensor, k: Tensor, v: Tensor) -> States:
        """The segment's part of q, k and v."""
        keys = slice(self.keys.start, self.keys.stop)
        return q[self.rows.start : self.rows.stop], k[keys], v[keys]

    def visible(self, mask: Mask, device: torch.device) -> Tensor:
        """(2, rows): the first of the segment's keys that each row sees, and the one past its last."""
        if mask.key_ranges is not None:
            return mask.key_ranges[:, self.rows.start : self.rows.stop] - self.keys.start
        return visible_keys(len(self.rows), len(self.keys), causal=mask.causal, window=mask.window, device=device)

    def plain(self, mask: Mask, softcap: float) -> bool:
        """Whether SDPA can express it: all rows have keys, and nothing but causality hides one."""
        simple = mask.window is None and mask.key_ranges is None and not softcap
        return simple and bool(self.rows and self.keys) and (not mask.causal or len(self.rows) == len(self.keys))


def _segments(q: Tensor, k: Tensor, mask: Mask) -> Iterator[_Segment]:
    row_bounds, key_bounds, used = (None if table is None else table.tolist() for table in mask.tables[:3])
    assert row_bounds is not None and key_bounds is not None
    for i, (start, stop) in enumerate(pairwise(row_bounds)):
        first = key_bounds[i]
        if stop > start:
            yield _Segment(range(start, stop), range(first, key_bounds[i + 1] if used is None else first + used[i]))


def _alike(segments: Iterator[_Segment], mask: Mask, softcap: float) -> list[list[_Segment]]:
    """Segments that one call of SDPA computes: short ones of one length, such as thousands of small images. A call for
    each takes longer than its work: 1.25 s for 5,000 of 16 tokens with the backward, 0.24 s together (measured)."""
    together: dict[Any, list[_Segment]] = {}
    for segment in segments:
        lengths = len(segment.rows), len(segment.keys)
        short = segment.plain(mask, softcap) and max(lengths) <= _SHORT
        together.setdefault(lengths if short else segment, []).append(segment)
    return list(together.values())


def _places(ranges: list[range]) -> Any:
    """Neighbouring rows, or those of ranges of one length one after another, to index with."""
    if len(ranges) == 1 or all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return (torch.tensor([part.start for part in ranges])[:, None] + torch.arange(len(ranges[0]))).flatten()


def _stacked(x_THD: Tensor, at: Any, count: int) -> Tensor:
    """(count, rows, H, D)."""
    return x_THD[at].unflatten(0, (count, -1))


def _tokens_first(x_NHRD: Tensor) -> Tensor:
    """(count, H, rows, D) -> (count * rows, H, D)."""
    return x_NHRD.transpose(1, 2).flatten(0, 1)


def _blocks(q: Tensor) -> Iterator[slice]:
    """D rows at a time, so that their scores are as large as the keys."""
    return (slice(start, min(start + q.shape[2], len(q))) for start in range(0, len(q), q.shape[2]))


def _scores(
    q_RHD: Tensor, k_LKD: Tensor, visible: Tensor, softmax_scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """The masked scores (K, H / K, rows, keys), and the slope of the softcap at each."""
    scores = _grouped(q_RHD, k_LKD.shape[1]) @ _per_key_head(k_LKD).transpose(-1, -2) * softmax_scale
    slope = None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    return scores.masked_fill(~_seen(visible, len(k_LKD)), -math.inf), slope


def _column(sinks: Tensor, scores_HRL: Tensor) -> Tensor:
    """The sink of each head as one more score of each row."""
    return sinks.to(scores_HRL.dtype)[:, None, None].expand(-1, scores_HRL.shape[1], 1)


def _seen(visible: Tensor, keys: int) -> Tensor:
    """(rows, keys) bool."""
    (first, stop), key = visible[..., None], torch.arange(keys, device=visible.device)
    return (key >= first) & (key < stop)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grouped(x_RHD: Tensor, kv_heads: int) -> Tensor:
    """(rows, H, D) -> (K, H / K, rows, D), wide."""
    return x_RHD.to(_wide(x_RHD)).transpose(0, 1).unflatten(0, (kv_heads, -1))


def _per_key_head(x_LKD: Tensor) -> Tensor:
    """(keys, K, D) -> (K, 1, keys, D), wide."""
    return x_LKD.to(_wide(x_LKD)).transpose(0, 1)[:, None]


def _heads_first(*states: Tensor) -> list[Tensor]:
    """(N, T, H, D) -> (N, H, T, D), as SDPA has them: all of one head dim. Columns of zeros change no score."""
    widest = max(x.shape[3] for x in states)
    wide = (x if x.shape[3] == widest else F.pad(x, (0, widest - x.shape[3])) for x in states)
    return [x.transpose(1, 2) for x in wide]
