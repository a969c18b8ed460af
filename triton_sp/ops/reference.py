"""The eager PyTorch twin of every op: the oracle that the kernels are tested against, and the CPU path.

Shape letters, here and everywhere: T local tokens, S tokens of the whole stream, H heads, K key/value heads, D head
dim, P ranks, B batch, V visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_sp.kernels.mask import Mask


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


def _attend_segment(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, visible: Tensor, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """One segment by the textbook formula. Returns out (L, H, D) and log-sum-exp (L, H), both fp32 or wider."""
    wide = torch.promote_types(q_LHD.dtype, torch.float32)
    repeat = q_LHD.shape[1] // k_LKD.shape[1]
    q, k, v = (x.to(wide).transpose(0, 1) for x in (q_LHD, k_LKD, v_LKD))
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    (first, stop), key = visible[..., None], torch.arange(len(k_LKD), device=k_LKD.device)
    scores = scores.masked_fill((key < first) | (key >= stop), -math.inf)
    lse = torch.logsumexp(scores, -1)
    # A row without any key has lse = -inf; its probabilities are 0 by definition, not exp(-inf + inf).
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (weights @ v).transpose(0, 1), lse.transpose(0, 1)


def _attend_segment_by_rows(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, visible: Tensor, softcap: float, scale: float
) -> Tensor:
    """The same in O(L) memory, the backward's too: D rows at a time, so that their scores are as large as the keys, and
    are formed again in the backward."""
    attend, rows = partial(checkpoint, use_reentrant=False, preserve_rng_state=False), q_LHD.shape[2]
    parts = [
        attend(_attend_segment, q, k_LKD, v_LKD, seen, softcap, scale)[0]
        for q, seen in zip(q_LHD.split(rows), visible.split(rows, 1), strict=True)
    ]
    return torch.cat(parts)


def _attend_segment_sdpa(q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One segment whose rows all have keys, through SDPA, which keeps O(L) rather than O(L^2) for the backward."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_LKD, v_LKD))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out[0].transpose(0, 1)


def attend_exactly(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, mask: Mask, *, softmax_scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The oracle: attention inside each segment by the textbook formula in fp32 or wider; see `varlen_attention`.

    Returns out (T, H, D) in the dtype of q, and the log-sum-exp (T, H) in fp32 or wider.
    """
    parts = [
        _attend_segment(q, k, v, _visible(mask, rows, keys, q.device), softcap, softmax_scale)
        for rows, keys, q, k, v in _segments(q_THD, k_TKD, v_TKD, mask)
    ]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    slack = len(q_THD) - int(mask.cu_seqlens_q[-1])
    lses = [lse for _, lse in parts] + [torch.full((slack, q_THD.shape[1]), -math.inf, dtype=wide, device=q_THD.device)]
    return _join([out.to(q_THD.dtype) for out, _ in parts], q_THD, k_TKD, v_TKD, slack), torch.cat(lses)


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, mask: Mask, *, softmax_scale: float, softcap: float = 0.0
) -> Tensor:
    """The CPU path: the same output in O(T) memory, through SDPA where SDPA can express the mask."""
    plain = mask.window is None and not softcap and mask.key_ranges is None
    outs = []
    for rows, keys, q, k, v in _segments(q_THD, k_TKD, v_TKD, mask):
        if plain and len(k) and (not mask.causal or len(q) == len(k)):
            outs.append(_attend_segment_sdpa(q, k, v, causal=mask.causal, scale=softmax_scale))
        else:
            visible = _visible(mask, rows, keys, q.device)
            outs.append(_attend_segment_by_rows(q, k, v, visible, softcap, softmax_scale).to(q.dtype))
    return _join(outs, q_THD, k_TKD, v_TKD, len(q_THD) - int(mask.cu_seqlens_q[-1]))


def _segments(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Iterator[tuple[range, range, Tensor, Tensor, Tensor]]:
    """Of each segment its rows and the keys that count, as ranges and as parts of q, k and v."""
    row_bounds, key_bounds, used = (None if table is None else table.tolist() for table in mask.tables[:3])
    assert row_bounds is not None and key_bounds is not None
    for i, (start, stop) in enumerate(pairwise(row_bounds)):
        first = key_bounds[i]
        last = key_bounds[i + 1] if used is None else first + used[i]
        yield range(start, stop), range(first, last), q[start:stop], k[first:last], v[first:last]


def _visible(mask: Mask, rows: range, keys: range, device: torch.device) -> Tensor:
    """(2, rows): the first of the segment's keys that each row sees, and the one past its last."""
    if mask.key_ranges is not None:
        return mask.key_ranges[:, rows.start : rows.stop] - keys.start
    return visible_keys(len(rows), len(keys), causal=mask.causal, window=mask.window, device=device)


def _join(outs: list[Tensor], q: Tensor, k: Tensor, v: Tensor, slack: int) -> Tensor:
    """The segments' outputs one after another, and 0 for the rows that belong to none."""
    if slack:
        outs = outs + [q.new_zeros(slack, q.shape[1], v.shape[2])]
    # Not a bare zeros(): on a rank without a single segment q, k and v must hang on the graph too. Engines wait for the
    # gradients of what they came from, and ZeRO 1 and 2 take it that all ranks have the same ones.
    return torch.cat(outs) if outs else (q[..., : v.shape[2]] + k.sum() + v.sum()) * 0


def pack(xs: Sequence[Tensor], boxes: Sequence[Sequence[int]], size: int) -> Tensor:
    """Boxes of several tensors in one buffer; see `packing.pack`."""
    flat = xs[0].new_empty(size, xs[0].shape[-1])
    for tensor, row, rows, head, heads, start, stride in boxes:
        _window(flat, rows, heads, start, stride).copy_(xs[tensor][row : row + rows, head : head + heads])
    return flat


def unpack(
    flat: Tensor, boxes: Sequence[Sequence[int]], rows_of: Sequence[int], heads_of: Sequence[int]
) -> list[Tensor]:
    """The boxes of a buffer added to tensors of 0; see `packing.unpack`."""
    flat, wide = flat.contiguous(), torch.promote_types(flat.dtype, torch.float32)
    xs = [
        torch.zeros(rows, heads, flat.shape[-1], dtype=wide, device=flat.device)
        for rows, heads in zip(rows_of, heads_of, strict=True)
    ]
    for tensor, row, rows, head, heads, start, stride in boxes:
        xs[tensor][row : row + rows, head : head + heads] += _window(flat, rows, heads, start, stride)
    return [x.to(flat.dtype) for x in xs]


def _window(flat: Tensor, rows: int, heads: int, start: int, stride: int) -> Tensor:
    """(rows, heads, D) of a buffer (size, D): `heads` neighbouring vectors, every `stride`."""
    dim = flat.shape[-1]
    return flat.as_strided((rows, heads, dim), (stride * dim, dim, 1), flat.storage_offset() + start * dim)


def splice(text: Tensor | None, visual: Tensor, index: Tensor) -> Tensor:
    """Rows of visual where index >= 0, of text elsewhere, 0 where there is no such row. See `splicing.splice`."""
    text = visual[:0] if text is None else text
    out = visual.new_zeros(len(index), visual.shape[1])
    seen, read = index >= 0, (index < 0) & (index > -1 - len(text))
    out[seen] = visual[index[seen]]
    out[read] = text[-1 - index[read]]
    return out


def norm_and_rotate(
    x_THD: Tensor, tables: tuple[Tensor, Tensor] | None, weight_D: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """RMSNorm over D, then rotary embeddings by tables cos, sin (T, D); see `packing.pack_rotated`."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x = x_THD.to(wide)
    if weight_D is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide)
    if tables is not None:
        cos, sin = (table.to(wide)[:, None] for table in tables)
        x = x * cos + _quarter_turn(x, interleaved) * sin
    return x.to(x_THD.dtype)


def norm_and_rotate_backward(
    grad_THD: Tensor,
    x_THD: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    weight_D: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight (0 without one)."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    grad, x = grad_THD.to(wide), x_THD.to(wide)
    if tables is not None:
        cos, sin = (table.to(wide)[:, None] for table in tables)
        grad = grad * cos - _quarter_turn(grad * sin, interleaved)
    if weight_D is None:
        return grad.to(x_THD.dtype), grad.new_zeros(x.shape[-1])
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * scale
    weight_grad = (grad * unit).sum((0, 1))
    grad = grad * weight_D.to(wide)
    grad = scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    return grad.to(x_THD.dtype), weight_grad


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair of columns (a, b) becomes (-b, a); its adjoint is its negative."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
