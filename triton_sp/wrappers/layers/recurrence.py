"""Recurrent layers over a stream: causal convolutions and recurrences, each rank with its contiguous tokens.

A convolution gets the few tokens before its part from the ranks that have them. A recurrence is computed by one of two
methods, see plan/recurrence.py. Rows and packed documents are segments, at whose starts tokens look back to zeros and
states are zero: each segment has a call of its own, so that the functions need not know of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp.plan.recurrence import Method, groups_of, halo, heads_of_ranks, pieces
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.wrappers.layers.rules import Affine, Recurrence, passed_on


def convolve(x_CT: Tensor, run: Callable[[Tensor], Tensor], reach: int, stream: Stream) -> Tensor:
    """A causal convolution along this rank's tokens (1, C, T).

    Args:
        run: the convolution of one row (1, C, L), which looks `reach` tokens back, and to zeros before the first.
    """
    group, shards = stream.group, stream.shards
    plan = halo(shards, stream.segments, group.rank, reach)
    parts = stream.carry.pieces
    x = x_CT[0].T
    before = x[:0]
    if plan.needed:
        rows = torch.cat([x[part.start : part.stop] for part in plan.sends])
        before = collectives.exchange(rows, [len(part) for part in plan.sends], plan.receives, group)
    if not parts:
        return joined_to(x_CT, before)
    stretches = [F.pad(before, (0, 0, reach - len(before), 0))]
    for part in parts:
        stretches += [x[part.start : part.stop], x.new_zeros(reach, x.shape[1])]
    out = run(torch.cat(stretches[:-1]).T[None])
    ends = list(accumulate(reach + len(part) for part in parts))
    return torch.cat([out[..., end - len(part) : end] for end, part in zip(ends, parts, strict=True)], -1)


def joined_to(x: Tensor, *others: Tensor) -> Tensor:
    """x, as if it depended on others too: they get a gradient of zeros, and the backward of their collectives runs. A
    rank that has no use for them must still take part in it."""
    return x + sum(other.flatten()[:0].sum().to(x.dtype) for other in others)


def recur(rule: Recurrence, stream: Stream, method: Method) -> Tensor:
    """The outputs (1, T, H, V) of a recurrence over the whole stream for this rank's tokens."""
    if method == "states":
        return _by_states(rule, stream)
    if method == "heads":
        return _by_heads(rule, stream)
    return _run_segments(rule, stream.carry.pieces)


def _run_segments(rule: Recurrence, segments: Sequence[range]) -> Tensor:
    """The tokens of each segment by themselves."""
    outs = [rule.rows(rows).run()[0] for rows in segments]
    return torch.cat(outs, 1) if outs else joined_to(rule.value, *rule.tokens, *rule.weights)


def _by_states(rule: Recurrence, stream: Stream) -> Tensor:
    """Each rank works out what its tokens make of any state before them, then gets that state from the ranks before."""
    carry, value = stream.carry, rule.value
    outs: list[Tensor] = []
    found: Affine | None = None  # of the tokens that continue a segment
    sent: Tensor | None = None  # what this rank's tokens make of the state of the segment that goes on behind them
    for index, rows in enumerate(carry.pieces):
        part, goes_on = rule.rows(rows), bool(carry.receivers) and index == len(carry.pieces) - 1
        if index == 0 and carry.senders:
            found = part.affine()
            out, sent = found.out, torch.cat([found.update, found.mix], -1)
        else:
            out, state = part.run(final=goes_on)
            sent = None if state is None else F.pad(state, (0, rule.mixed))
        outs.append(out)
    arrived = _exchange_maps(rule, sent, stream)
    if found is None:
        return (
            joined_to(torch.cat(outs, 1), arrived) if outs else joined_to(value, arrived, *rule.tokens, *rule.weights)
        )
    wide = arrived.dtype
    with torch.autocast(value.device.type, enabled=False):
        update, mix = arrived.split([value.shape[-1], rule.mixed], -1)
        state = update[0]
        for index in range(1, len(carry.senders)):
            state = passed_on(state, mix[index], update[index])
        first = found.out.to(wide) + torch.einsum("bthk,hkv->bthv", found.response.to(wide), state)
    return torch.cat([first.to(value.dtype), *outs[1:]], 1)


def _exchange_maps(rule: Recurrence, sent: Tensor | None, stream: Stream) -> Tensor:
    """The (update, mix) of each rank from which this one's first segment comes, (senders, H, K, ...)."""
    carry, ranks = stream.carry, range(stream.group.size)
    heads, values = rule.value.shape[2:]
    wide = torch.promote_types(rule.value.dtype, torch.float32)
    # Of nothing, but it depends on the tokens: a rank that sends nothing takes part in the backward too.
    maps = rule.value[0, :0, :, None, :1].to(wide).expand(0, heads, rule.keys, values + rule.mixed)
    if carry.receivers:
        assert sent is not None
        maps = torch.cat([maps, *[sent[None]] * len(carry.receivers)])
    send, receive = ([int(rank in who) for rank in ranks] for who in (carry.receivers, carry.senders))
    return collectives.exchange(maps, send, receive, stream.group)


def _by_heads(rule: Recurrence, stream: Stream) -> Tensor:
    """Tokens for heads, the rule on all tokens of this rank's heads, and heads for tokens."""
    group, sizes = stream.group, stream.shards.sizes
    heads, values = rule.value.shape[2:]
    ranges = heads_of_ranks(heads, min(x.shape[2] for x in rule.tokens), group.size)
    arrived = _tokens_for_heads([[_of_heads(x[0], part, heads) for x in rule.tokens] for part in ranges], stream)
    own, mine = sizes[group.rank], ranges[group.rank]
    whole = rule.with_tokens([x[None] for x in arrived]).weights_of(mine)
    every = range(stream.shards.total)
    out = _run_segments(whole, pieces(stream.segments, every) if mine else [])
    receive = [own * len(part) * values for part in ranges]
    back = collectives.exchange(out.flatten(), [size * len(mine) * values for size in sizes], receive, group)
    outs = [x.view(own, len(part), values) for x, part in zip(back.split(receive), ranges, strict=True)]
    return torch.cat(outs, 1)[None]


def _of_heads(x: Tensor, heads: range, total: int) -> Tensor:
    """What some of `total` heads need of a tensor (T, heads or groups, ...)."""
    index = groups_of(heads, total // x.shape[1])
    return x[:, index[0] : index[-1] + 1] if len(set(index)) == len(index) > 0 else x[:, index]


def _tokens_for_heads(parts: list[list[Tensor]], stream: Stream) -> list[Tensor]:
    """This rank's heads of all tokens (S, h, ...), from what each rank's heads need of this rank's (T, h, ...).

    What is kept in float32 is not rounded to travel, and goes by itself.
    """
    group, sizes = stream.group, stream.shards.sizes
    mine = parts[group.rank]
    arrived = list(mine)
    for dtype in dict.fromkeys(x.dtype for x in mine):
        chosen = [index for index, x in enumerate(mine) if x.dtype == dtype]
        packed = [torch.cat([part[index].flatten(1) for index in chosen], 1) for part in parts]
        widths = [mine[index].shape[1:].numel() for index in chosen]
        receive = [size * sum(widths) for size in sizes]
        whole = collectives.exchange(
            torch.cat([x.flatten() for x in packed]), [x.numel() for x in packed], receive, group
        ).view(sum(sizes), sum(widths))
        for index, x in zip(chosen, whole.split(widths, 1), strict=True):
            arrived[index] = x.view(len(x), *mine[index].shape[1:])
    return arrived
