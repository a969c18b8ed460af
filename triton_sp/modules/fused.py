"""The layout of a fused sequence: which token of it comes from the text, and which from the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.loss import IGNORE, shift
from triton_sp.plan.shards import Shards


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
