"""The text: one stream of the batch's tokens without padding, cut into shards before anything is embedded.

A padded (B, S) batch becomes a stream (1, S') of its tokens, row after row, each row or packed document a segment; the
decoder, or the composite model around it, sees this rank's part of it. Positions are computed for the whole batch and
then selected, so a token keeps the position that it has in one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Spans, Stack
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.loss import IGNORE
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers import recurrent
from triton_sp.wrappers.attention import redirect
from triton_sp.wrappers.install import Installation, LastCall, Override
from triton_sp.wrappers.scope import (
    KEYWORD,
    AttentionScope,
    Call,
    DecoderScope,
    active,
    check_tally,
    current,
    refuse_lost_scope,
)

# Every mask factory of transformers hands a 4-D mask on as it is; the real mask travels in the scope.
UNTOUCHED = torch.zeros(1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class TextCall(Call):
    """One call of the wrapped model, as its decoder needs it.

    Attributes:
        stream: the stream that the batch's tokens form.
        shape: (B, S) of the batch.
        index: (S',) where each token of the stream stands in the flattened batch.
        mask: the attention_mask that the model around the decoder gets, to notice one that makes another.
        needed: how many features each rank's placeholders need, by the method that makes them.
        longest: the longest position of the batch, once its tokens have been cut.
        records_routers: whether the decoder returns the logits of its routers.
    """

    stream: Stream
    shape: tuple[int, int]
    index: Tensor
    mask: Tensor | None
    choice: PlanChoice
    needed: dict[str, Shards] = field(default_factory=dict)
    longest: Tensor | None = None
    records_routers: bool = False
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def local_index(self) -> Tensor:
        return self.index[self.stream.local]


def lay_out(
    shape: tuple[int, int],
    mask: Tensor | None,
    documents: Tensor | None,
    targets: Tensor | None,
    mutual: Tensor | None,
    spans: Spans | None,
    group: Group,
    device: torch.device,
    plan: Callable[[Segments], PlanChoice],
) -> TextCall:
    """Plan the stream of a batch. All inputs are the whole batch's, so the answer is the same on every rank.

    Args:
        mask: (B, S), non-zero at tokens; None if all are.
        documents: (B, S) bool, where packed documents begin, or None.
        targets: (B, S) shifted labels, or None.
        mutual: (B, S) bool, the tokens of `spans`, or None.
        plan: decides how the stream is cut, from its segments.

    Raises:
        InputError: a mask with holes, a label that is predicted from padding after the tokens, or spans that are not.
    """
    length = shape[1]
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    labelled = torch.zeros_like(keep) if targets is None else targets.detach().cpu() != IGNORE
    _check_mask(keep, labelled)
    # The last padding before the first token predicts that token: without keys, as sdpa and flash attention have it.
    keyless = ~keep & labelled
    index = (keep | keyless).flatten().nonzero().flatten()
    if not len(index):
        raise InputError(
            "attention_mask", expected="at least one token", found="only padding", remedy="drop empty batches"
        )
    alone = keyless.flatten()[index]
    starts = index % length == 0
    starts[0] = True
    starts[1:] |= (index[1:] // length != index[:-1] // length) | alone[1:] | alone[:-1]
    if documents is not None:
        starts |= documents.flatten()[index]
    firsts = starts.nonzero().flatten()
    cu_seqlens = torch.cat([firsts, torch.tensor([len(index)])]).to(torch.int32)
    seqused_k = None
    if bool(alone.any()):
        seqused_k = torch.where(alone[firsts], 0, cu_seqlens.diff()).to(device, torch.int32)
    segments = Segments(tuple(cu_seqlens.tolist()))
    if spans is not None:
        mask = UNTOUCHED.to(device)
        if mutual is not None:
            mutual = mutual.detach().cpu()
            _check_keyless(keyless & mutual)
            found = _find_spans(mutual.flatten()[index], index // length, starts, spans)
            segments = replace(segments, spans=found, cut_spans=spans.cut)
    choice = plan(segments)
    stream = Stream(group, choice.shards, cu_seqlens.to(device), seqused_k, segments, choice.plan, choice.chunks)
    return TextCall(stream, shape, index.to(device), mask, choice)


def _check_mask(keep: Tensor, labelled: Tensor) -> None:
    after_tokens = keep.cumsum(1) > 0  # at or behind the first token of the row
    tokens_left = keep.flip(1).cumsum(1).flip(1) > 0
    holes = ~keep & after_tokens & tokens_left
    if bool(holes.any()):
        row, column = holes.nonzero()[0].tolist()
        raise InputError(
            "attention_mask",
            expected="padding before or after the tokens of a row, not between them",
            found=f"a hole in row {row} at column {column}",
            remedy="remove the masked tokens, or pass packed documents by position_ids",
        )
    wrong = ~keep & after_tokens & labelled
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            "labels",
            expected="-100 at the padding behind the tokens",
            found=f"a label in row {row} at column {column + 1}, predicted from padding",
            remedy="labels[attention_mask == 0] = -100",
        )


def _check_keyless(wrong: Tensor) -> None:
    if bool(wrong.any()):
        raise InputError(
            "labels",
            expected="-100 at the first token behind padding",
            found=f"a label in row {int(wrong.nonzero()[0, 0])}, predicted from padding that sees tokens",
            remedy="set labels to -100 where token_type_ids mark a span, as the model's processor does",
        )


def _find_spans(mutual: Tensor, row: Tensor, starts: Tensor, spans: Spans) -> tuple[range, ...]:
    """The runs of tokens that see one another, of more than one token.

    Args: for each token of the stream whether it is of a span, its row in the batch, and whether a segment starts.
    """
    joined = F.pad(mutual[:-1] & mutual[1:] & (row[:-1] == row[1:]), (1, 0))  # to the token before
    firsts = mutual & ~joined
    crossing = joined & starts
    if bool(crossing.any()):
        raise InputError(
            "position_ids",
            expected="packed documents that end where spans of token_type_ids do",
            found=f"a document that starts inside a span, in row {int(row[crossing][0])}",
            remedy="put a token of another type between the images of two documents",
        )
    if spans.single and bool((row[firsts].bincount() > 1).any()):
        raise InputError(
            "token_type_ids",
            expected=f"one run of {spans.token_type} in each row, its prefix",
            found=f"{int(row[firsts].bincount().max())} in row {int(row[firsts].bincount().argmax())}",
            remedy="mark the prefix alone, and put documents into rows of their own",
        )
    begins = firsts.nonzero().flatten().tolist()
    ends = (mutual & ~F.pad(joined[1:], (0, 1))).nonzero().flatten().tolist()
    return tuple(range(begin, end + 1) for begin, end in zip(begins, ends, strict=True) if end > begin)


def install(stack: Stack, installation: Installation) -> None:
    """Override a decoder's forward, its attention, and rotary embeddings that look at the longest position."""
    redirect(stack.attention, installation)
    recurrent.redirect(stack.recurrent, installation)
    for rotary in stack.rotaries:
        installation.override(rotary, _run_rotary)
    installation.override(stack.module, _run_decoder)


def _run_decoder(override: Override, *args: Any, **kwargs: Any) -> Any:
    call = current(TextCall)
    if call is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    installation = override.installation
    stack = installation.anatomy.decoder
    assert stack is not None
    arguments = override.bind(args, kwargs)
    if call.longest is None:
        call = localise_text(arguments, call, installation)
    else:
        _expect_mask(arguments.get("attention_mask"), call, stack)
    arguments["attention_mask"] = UNTOUCHED.to(call.index.device)
    arguments[KEYWORD] = scope = AttentionScope(call.stream, call.tally, causal=True if stack.spans else None)
    if call.records_routers:
        arguments["output_router_logits"] = True
    assert call.longest is not None
    with active(DecoderScope(call.longest)):
        out = override.original(**arguments)
    check_tally(call.tally, len(stack.attention), stack.name)
    check_tally(call.tally, len(stack.recurrent), stack.name, "recurrent")
    ways = [f"recurrent layers by {way}" for way in sorted(scope.ways)]
    installation.last_calls[stack.name] = LastCall(call.choice, (call.stream.describe(), *ways))
    return out


def _expect_mask(mask: Any, call: TextCall, stack: Stack) -> None:
    """Raise if the model around the decoder has made a mask of its own."""
    if isinstance(mask, dict) and all(part is call.mask for part in mask.values()):  # a mask for each type of layer
        return
    if mask is None or mask is call.mask:
        return
    if call.mask is None or not isinstance(mask, Tensor) or not torch.equal(mask.bool(), call.mask.bool()):
        raise UnsupportedModelError(
            stack.name,
            expected="the attention_mask of the batch",
            found="a mask that the composite model made itself",
            remedy="this family is not handled yet",
        )


_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
_HANDLED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks", *_PER_TOKEN)


def localise_text(arguments: dict[str, Any], call: TextCall, installation: Installation) -> TextCall:
    """Replace the inputs of a decoder, or of the composite model around it, by those of this rank's tokens.

    Returns:
        The call, which knows then that this has been done.
    """
    stack, index, (rows, length) = installation.anatomy.decoder, call.local_index, call.shape
    assert stack is not None
    for name in ("input_ids", "inputs_embeds", *_PER_TOKEN):
        value = arguments.get(name)
        if value is not None:
            if tuple(value.shape[:2]) != (rows, length):
                raise InputError(
                    name,
                    expected=f"{(rows, length)} tokens, as the batch has",
                    found=f"{tuple(value.shape[:2])} in the decoder",
                    remedy="this model changes the sequence between its input and its decoder, and cannot be sharded",
                )
            arguments[name] = value.flatten(0, 1)[index][None]
    _expect_mask(arguments.get("attention_mask"), call, stack)
    # Padding is left out; a model around the decoder that makes a mask nevertheless is noticed by that.
    arguments["attention_mask"] = mask = call.mask if stack.spans else None

    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=index.device)[None]
    longest = positions.max()
    positions = positions.expand(*positions.shape[:-2], rows, length).flatten(-2)
    arguments["position_ids"] = positions[..., None, index]
    arguments.pop("cache_position", None)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
        arguments.pop(name, None)
    _localise_deepstack(arguments, index)
    fusion = installation.anatomy.fusion
    handled = {*_HANDLED, *(fusion.visual_arguments if fusion else ())}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in handled and length in value.shape:
            raise UnsupportedModelError(
                stack.name,
                expected="inputs that are known to be per token",
                found=f"{name} of shape {tuple(value.shape)}",
                remedy="leave it out; it is not handled yet",
            )
    return replace(call, longest=longest, mask=mask)


def _localise_deepstack(arguments: dict[str, Any], index: Tensor) -> None:
    """Qwen3-VL adds visual features of several depths in the first layers: keep the rows of this rank's tokens."""
    mask = arguments.get("visual_pos_masks")
    if mask is None:
        return
    flat = mask.flatten()
    local = flat[index]
    rows = (flat.cumsum(0) - 1)[index][local]
    arguments["visual_pos_masks"] = local[None]
    if arguments.get("deepstack_visual_embeds") is not None:
        arguments["deepstack_visual_embeds"] = [
            level.index_select(0, rows) for level in arguments["deepstack_visual_embeds"]
        ]


def _run_rotary(override: Override, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Long-context frequencies depend on the longest position of the batch, which may be another rank's: add it."""
    scope = current(DecoderScope)
    if scope is None:
        return override.original(x, position_ids, *args, **kwargs)
    extra = scope.longest_position.expand(*position_ids.shape[:-1], 1).to(position_ids.dtype)
    tables = override.original(x, torch.cat([position_ids, extra], -1), *args, **kwargs)
    return tuple(table[..., :-1, :] for table in tables)


def gather_tokens(local: Tensor, call: TextCall, installation: Installation) -> Tensor:
    """(1, T, V) of this rank -> (B, S, V) of the batch, 0 at padding."""
    whole = stages.gather(local[0], call.stream)
    rows, length = call.shape
    out = whole.new_zeros(rows * length, whole.shape[-1]).index_copy(0, call.index, whole).view(rows, length, -1)
    return collectives.scale_gradient(
        out, 1.0 if installation.config.gradient == "mean" else 1.0 / installation.group.size
    )
