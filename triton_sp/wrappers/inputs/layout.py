"""The layout of a batch of text: one stream of its tokens without padding, cut into shards before anything is embedded.

A padded (B, S) batch becomes a stream (1, S') of its tokens, row after row. Each row, or each packed document, is a
segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Spans
from triton_sp.errors import InputError
from triton_sp.loss import IGNORE
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.masks import CHUNKED
from triton_sp.wrappers.install import Installation
from triton_sp.wrappers.scope import Call

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
        by_layer_type: the streams of layers that attend in other segments than `stream`'s.
        whole: the mask and the positions of the whole batch, likewise.
        positions: this rank's positions, and the longest of the batch, once its tokens have been cut.
        routes: whether each rank is sent the features that its placeholders need.
        records_routers: whether the decoder returns the logits of its routers.
    """

    stream: Stream
    shape: tuple[int, int]
    index: Tensor
    mask: Tensor | None
    choice: PlanChoice
    needed: dict[str, Shards] = field(default_factory=dict)
    by_layer_type: Mapping[str | None, Stream] = field(default_factory=dict)
    positions: Tensor | None = None
    longest: Tensor | None = None
    whole: Mapping[str, Tensor | None] = field(default_factory=dict)
    records_routers: bool = False
    routes: bool = False
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def local_index(self) -> Tensor:
        """(T,) where each token of this rank stands in the flattened batch."""
        return self.index[self.stream.local]


def lay_out(batch: Batch, spans: Spans | None, group: Group, plan: Callable[[Segments], PlanChoice]) -> TextCall:
    """Plan the stream of a batch, which every rank has whole, so that the answer is the same on every rank.

    Args:
        spans: how a model that makes its masks itself reads `batch.mutual`.
        plan: decides how the stream is cut, from its segments.

    Raises:
        InputError: a mask with holes, a label that is predicted from padding after the tokens, or spans that are not.
    """
    keep = torch.ones(batch.shape, dtype=torch.bool) if batch.mask is None else (batch.mask.detach() != 0).cpu()
    labelled = torch.zeros_like(keep) if batch.targets is None else (batch.targets.detach() != IGNORE).cpu()
    if bool(keep.all()):
        index, keyless, alone = torch.arange(keep.numel()), None, None
    else:
        _check_mask(keep, labelled)
        # The last padding before the first token predicts it: without keys, as sdpa and flash attention have it.
        keyless = ~keep & labelled
        index = (keep | keyless).flatten().nonzero().flatten()
        alone = keyless.flatten()[index] if bool(keyless.any()) else None
    if not len(index):
        raise InputError(
            "attention_mask", expected="at least one token", found="only padding", remedy="drop empty batches"
        )
    starts = _starts(batch, keep if keyless is None else keep | keyless, index, alone)
    segments, seqused_k = _segments(starts, alone, batch.device)
    if spans is not None and batch.mutual is not None:
        mutual = batch.mutual.detach().cpu()
        if keyless is not None:
            _check_keyless(keyless & mutual)
        found = _find_spans(mutual.flatten()[index], index // batch.shape[1], starts, spans)
        segments = replace(segments, spans=found, cut_spans=spans.cut)
    choice = plan(segments)

    def stream_of(segments: Segments, seqused_k: Tensor | None) -> Stream:
        cu_seqlens = torch.from_numpy(segments.table).to(batch.device, torch.int32)
        how = (choice.plan, choice.chunks, choice.attention)
        return Stream(group, choice.shards, cu_seqlens, seqused_k, segments, *how)

    by_layer_type: dict[str | None, Stream] = {}
    if spans is not None and spans.causal_layers and segments.spans:
        by_layer_type[spans.causal_layers] = stream_of(replace(segments, spans=()), seqused_k)
    if batch.chunks is not None:
        by_layer_type[CHUNKED] = stream_of(*_segments(starts | batch.chunks.flatten()[index], alone, batch.device))
    mask = batch.mask if spans is None else UNTOUCHED.to(batch.device)
    stream, index = stream_of(segments, seqused_k), index.to(batch.device)
    return TextCall(stream, batch.shape, index, mask, choice, by_layer_type=by_layer_type)


def _segments(starts: Tensor, alone: Tensor | None, device: torch.device) -> tuple[Segments, Tensor | None]:
    """The segments, and how many keys of each count if there are tokens `alone`, which have no keys."""
    firsts = starts.nonzero().flatten()
    bounds = torch.cat([firsts, torch.tensor([len(starts)])])
    segments = Segments(tuple(bounds.tolist()))
    if alone is None:
        return segments, None
    return segments, torch.where(alone[firsts], 0, bounds.diff()).to(device, torch.int32)


def _starts(batch: Batch, kept: Tensor, index: Tensor, alone: Tensor | None) -> Tensor:
    """Whether a segment starts at each token of the stream: with its row, with a document, or by itself.

    Args:
        kept: (B, S) bool, what is in the stream; `index` are its places.
        alone: of each token whether it is a segment of its own.
    """
    counts = kept.sum(1)
    starts = torch.zeros(len(index), dtype=torch.bool)
    starts[(counts.cumsum(0) - counts)[counts > 0]] = True
    if batch.documents is not None:
        documents = batch.documents.flatten()
        starts |= documents if len(index) == len(documents) else documents[index]
    if alone is not None:
        starts |= alone
        starts[1:] |= alone[:-1]
    return starts


def _check_mask(keep: Tensor, labelled: Tensor) -> None:
    places, length = torch.arange(keep.shape[1]), keep.shape[1]
    first, last = keep.byte().argmax(1, keepdim=True), length - 1 - keep.flip(1).byte().argmax(1, keepdim=True)
    after_tokens = (places >= first) & keep.any(1, keepdim=True)  # at or behind the first token of the row
    holes = ~keep & after_tokens & (places <= last)
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
            spans.types,
            expected=f"one run of {spans.token_types[0]} in each row, its prefix",
            found=f"{int(row[firsts].bincount().max())} in row {int(row[firsts].bincount().argmax())}",
            remedy="mark the prefix alone, and put documents into rows of their own",
        )
    begins = firsts.nonzero().flatten().tolist()
    ends = (mutual & ~F.pad(joined[1:], (0, 1))).nonzero().flatten().tolist()
    return tuple(range(begin, end + 1) for begin, end in zip(begins, ends, strict=True) if end > begin)


def gather_tokens(local: Tensor, call: TextCall, installation: Installation) -> Tensor:
    """(1, T, V) of this rank -> (B, S, V) of the batch, 0 at padding."""
    whole = stages.gather(local[0], call.stream)
    rows, length = call.shape
    out = whole.new_zeros(rows * length, whole.shape[-1]).index_copy(0, call.index, whole).view(rows, length, -1)
    return collectives.scale_gradient(
        out, 1.0 if installation.config.gradient == "mean" else 1.0 / installation.group.size
    )
