"""The layout of a fused sequence: which token of it comes from the text, and which from the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError
from triton_sp.loss import IGNORE, shift
from triton_sp.plan.shards import Shards, shard_tokens


@dataclass(frozen=True, eq=False)
class FusedLayout:
    """The fused sequence of a batch, which every rank computes from the ids alone. Tensors are on the CPU.

    Attributes:
        source: int64 (B, S), the column of the text that a fused token comes from or replaces; -1 at padding.
        visual: bool (B, S), whether it is a visual token. In the order of rows and columns these are the visual stream.
        shards: the columns of each rank.
    """

    source: Tensor
    visual: Tensor
    shards: Shards

    @property
    def needer(self) -> Tensor:
        """int64 (V,), the rank that has each token of the visual stream among its columns."""
        of_columns = torch.arange(len(self.shards.sizes)).repeat_interleave(torch.tensor(self.shards.sizes))
        return of_columns.expand(len(self.visual), -1)[self.visual]

    def expand(self, values_BL: Tensor, fill: Any) -> Tensor:
        """Values of the tokens of the text as values of the fused tokens: (B, L) to (B, S).

        The value of a placeholder goes to each of its visual tokens. Padding gets `fill`.
        """
        source = self.source.to(values_BL.device)
        return values_BL.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill)


@dataclass(frozen=True, eq=False)
class Fused:
    """This rank's columns of a fused batch.

    Attributes:
        embeds: (B, T, C), in the dtype of the text.
        attention_mask: bool (B, T), False at padding.
        position_ids: int64 (B, T), counted in the whole fused sequence without padding.
        columns: the place of these T columns in the whole sequence; cut other tensors by `x[:, columns]`.
        layout: the whole sequence.
    """

    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    columns: slice
    layout: FusedLayout

    def targets(self, labels_BL: Tensor) -> Tensor:
        """The label that each token of this rank has to predict, (B, T); -100 if none.

        Args:
            labels_BL: int64 (B, L), the labels of the whole text, not shifted. Those of placeholders are ignored.
        """
        visual = self.layout.visual.to(labels_BL.device)
        return shift(self.layout.expand(labels_BL, IGNORE).masked_fill(visual, IGNORE))[:, self.columns]


def lay_out(
    places: Tensor, widths: Tensor, held: list[int], by_sample: bool, own_rank: int
) -> tuple[FusedLayout, Tensor, Tensor]:
    """The layout of a batch, and (V,) of each token of the visual stream the rank that has it and its row there.

    Args:
        places: bool (B, L), the placeholders.
        widths: int64 (B, L), how many visual tokens each of them stands for.
        held: how many features each rank has: of every sample if `by_sample`, else in all.
        own_rank: for errors.

    Raises:
        InputError: features and placeholders do not match.
    """
    used = places.any(1)
    samples = widths.where(places, 0).sum(1)
    uneven = by_sample and bool((samples[used] != sum(held)).any())
    if uneven or int(samples.sum()) != sum(held) * (int(used.sum()) if by_sample else 1):
        raise InputError(
            "visual_features",
            expected=f"{samples.tolist()} features of the samples, as many as their placeholders stand for",
            found=f"{sum(held)} {'of each' if by_sample else 'in all'}, {held} on the ranks",
            remedy="pass exactly one feature for each of these; if samples have different numbers of them, pass one "
            "stream (v, C)",
            rank=own_rank,
        )
    rank = torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held))
    row = torch.arange(len(rank)) - torch.tensor(Shards(tuple(held)).starts)[rank]
    if by_sample:
        row = (used.nonzero() * torch.tensor(held)[rank] + row).flatten()
        rank = rank.expand(int(used.sum()), -1).flatten()
    totals = widths.sum(1)
    source = torch.full((len(places), int(totals.max()) if len(places) else 0), -1)
    for line, width, total in zip(source, widths, totals.tolist(), strict=True):
        line[:total] = torch.repeat_interleave(width)
    visual = places.gather(1, source.clamp(min=0)) & (source >= 0)
    return FusedLayout(source, visual, shard_tokens(source.shape[1], len(held))), rank, row


def lengths_of_images(
    places: Tensor, held: int, by_sample: bool, lengths: Sequence[int] | None, own_rank: int
) -> Tensor:
    """How many visual tokens each placeholder of a whole image stands for: `lengths`, or else equally many.

    Args:
        places: bool (B, L), the placeholders.
        held: how many features there are: of every sample if `by_sample`, else in all.

    Raises:
        InputError: these are not as many as there are placeholders, or not equal numbers.
    """
    count = int(places.sum())
    if lengths is not None:
        if len(lengths) != count:
            raise InputError(
                "image_lengths",
                expected=f"{count}, one for each placeholder",
                found=f"{len(lengths)}",
                remedy="pass the number of features of each image",
                rank=own_rank,
            )
        return torch.tensor(lengths, dtype=torch.long)
    images = places.sum(1, keepdim=True).expand_as(places)[places] if by_sample else torch.full((count,), count)
    if bool((held % images).any()):
        raise InputError(
            "visual_features",
            expected=f"a multiple of the {images.unique().tolist()} images",
            found=f"{held} features{' of each sample' * by_sample}",
            remedy="pass image_lengths, the number of features of each image",
            rank=own_rank,
        )
    return held // images


def text_rows(embeds: Tensor | nn.Module, ids: Tensor, source: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of text for `splice`, and the row of each of this rank's (B x T) tokens; at visual tokens the row of 0.

    Args:
        embeds: (B, L, C), or the embedding module, which then embeds only the tokens of this rank.
        ids: (B, L).
        source, seen: (B x T,), the columns of FusedLayout that this rank has: `source` and `visual`.
    """
    batch, length = ids.shape
    flat = source + torch.arange(batch).repeat_interleave(len(source) // max(batch, 1)) * length
    read = ~seen & (source >= 0)
    if isinstance(embeds, Tensor):
        return embeds.flatten(0, 1), (-1 - flat).where(read, -1 - batch * length)
    local = ids.flatten().index_select(0, flat[read].to(ids.device, non_blocking=True))
    text = embeds(local[None])[0]
    return text, (-read.long().cumsum(0)).where(read, -1 - len(text))
