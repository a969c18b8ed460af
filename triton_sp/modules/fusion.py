"""Modules for people's own model scripts: they put visual features among the text, and no rank holds all of either.

They are called like those of `deepspeed.sequence.autosp_fusion` (PR #7984), so that a script changes only an import.
These are the differences: gradients reach the projection and the ViT; a rank receives only the visual features of its
own tokens, in one all-to-all; nothing is padded for the ranks to divide it, and parts may differ in size; tokens and
features that do not match raise an error on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from triton_sp import stages
from triton_sp.errors import InputError, shown
from triton_sp.modules.fused import Fused, lay_out, lengths_of_images, text_rows
from triton_sp.ops.splice import splice
from triton_sp.ranks import collectives, groups
from triton_sp.ranks.agreement import agree


class FusionAdapter(nn.Module):
    """Projects this rank's visual features and puts them in the place of the placeholder tokens, one for one.

    Every rank of the group calls it with the same ids and text embeddings and with its own part of the visual features.
    It returns this rank's part of the fused sequence: the columns that follow those of the rank before. Parts may
    differ in size. The gradient of a parameter is this rank's share; the sum over the ranks is the whole gradient.

    For another family, make a subclass that says which tokens are `placeholders`.

    Args:
        projection: visual features to the width of the text, token by token or merging neighbours.
        process_group: as for `triton_sp.wrap`.
        image_token_id: the id of a placeholder.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> adapter = FusionAdapter(nn.Identity(), None, image_token_id=7)
    >>> ids, text = torch.tensor([[1, 7, 7, 2]]), torch.tensor([[[1.0], [0.0], [0.0], [2.0]]])
    >>> adapter(torch.tensor([[[8.0], [9.0]]]), text, ids).flatten().tolist()
    [1.0, 8.0, 9.0, 2.0]
    >>> fused = adapter(torch.tensor([[[8.0], [9.0]]]), text, ids, details=True)
    >>> fused.position_ids.tolist(), fused.columns, fused.targets(ids).tolist()
    ([[0, 1, 2, 3]], slice(0, 4, None), [[-100, -100, 2, -100]])
    >>> dist.destroy_process_group()
    """

    expands = False  # whether a placeholder stands for a whole image

    def __init__(self, projection: nn.Module, process_group: Any = None, image_token_id: int = -200) -> None:
        super().__init__()
        self.projection = projection
        self.group = groups.resolve_group(process_group)
        self.image_token_id = image_token_id

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool: the tokens whose place visual features take."""
        return input_ids == self.image_token_id

    @overload
    def forward(
        self,
        visual_features: Tensor,
        text_embeds: Tensor | nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        image_lengths: Sequence[int] | None = None,
        details: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        visual_features: Tensor,
        text_embeds: Tensor | nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        image_lengths: Sequence[int] | None = None,
        details: Literal[True],
    ) -> Fused: ...

    def forward(
        self,
        visual_features: Tensor,
        text_embeds: Tensor | nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        image_lengths: Sequence[int] | None = None,
        details: bool = False,
    ) -> Tensor | Fused:
        """This rank's part of the fused embeddings.

        Args:
            visual_features: before the projection, this rank's: (B, v, C_v), v features of every sample, those of the
                ranks following one another in each; or (v, C_v), its part of one stream of all images in the order of
                the placeholders, for samples with different numbers of features. v may differ from rank to rank and
                be 0. In the first form those of a sample without any placeholder are passed over.
            text_embeds: (B, L, C) of the whole text; or the embedding module, which then embeds this rank's tokens
                only, and no placeholder.
            input_ids: (B, L).
            attention_mask: (B, L), 0 at padding of the text; all ones if left out.
            image_lengths: of an adapter with one placeholder an image: the features of each image, after the
                projection, in order. Left out, images of a sample (of the batch, in the second form) are of one length.
            details: return a `Fused`, with the mask, positions and targets of this rank's part.

        Returns:
            (B, T, C), or a Fused.

        Raises:
            InputError: tokens and features do not match. DisagreementError: the ranks' ids differ. On every rank.
        """
        ids = input_ids.detach().cpu()

        def describe() -> str:
            self._check(visual_features, text_embeds, input_ids, attention_mask)
            digest = hashlib.blake2s(ids.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
            return f"input_ids={tuple(ids.shape)} {digest}\nimage_lengths={image_lengths}\nndim={visual_features.ndim}"

        agree(self.group, describe)
        visual = self.projection(visual_features)
        held = [parts[0] for parts in collectives.integers_of_all([visual.shape[-2]], self.group)]
        places = self.placeholders(ids)
        widths = self._widths(places, sum(held), visual.ndim == 3, image_lengths)
        layout, owner, place = lay_out(places, widths, held, visual.ndim == 3, self.group.rank)
        own = layout.shards.range(self.group.rank)
        columns = slice(own.start, own.stop)
        arrived, order = stages.exchange_rows(visual.flatten(0, -2), owner, place, layout.needer, self.group)

        source, seen = layout.source[:, columns].flatten(), layout.visual[:, columns].flatten()
        text, rows = text_rows(text_embeds, input_ids, source, seen)
        rows[seen] = order
        embeds = splice(text, arrived.to(text.dtype), rows.to(text.device, non_blocking=True))
        embeds = embeds.unflatten(0, (len(ids), len(own)))
        if not details:
            return embeds
        given = torch.ones_like(ids) if attention_mask is None else attention_mask.detach().cpu()
        mask = layout.expand(given.bool(), False)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        local = [x[:, columns].to(embeds.device, non_blocking=True) for x in (mask, positions)]
        return Fused(embeds, local[0], local[1], columns, layout)

    def _check(self, visual: Tensor, text: Tensor | nn.Module, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point():
            raise InputError("input_ids", expected="integers (B, L)", found=shown(ids), remedy="pass a batch of ids")
        if isinstance(text, Tensor) and (text.ndim != 3 or text.shape[:2] != ids.shape):
            raise InputError(
                "text_embeds",
                expected=f"{(*ids.shape, 'C')}, an embedding for each of input_ids",
                found=shown(text),
                remedy="embed all of input_ids, placeholders by any valid id, or pass the embedding module",
            )
        if visual.ndim not in (2, 3) or (visual.ndim == 3 and len(visual) != len(ids)):
            raise InputError(
                "visual_features",
                expected=f"({len(ids)}, v, C) or (v, C)",
                found=shown(visual),
                remedy="pass this rank's features of each sample, or of all images of the batch in one stream",
            )
        if mask is not None and mask.shape != ids.shape:
            raise InputError(
                "attention_mask", expected=f"{tuple(ids.shape)}", found=shown(mask), remedy="pass one entry a token"
            )
        self.placeholders(ids.detach().cpu())

    def _widths(self, places: Tensor, held: int, by_sample: bool, lengths: Sequence[int] | None) -> Tensor:
        """(B, L) int64, how many visual tokens each placeholder stands for; 1 for every other token."""
        widths = torch.ones(places.shape, dtype=torch.long)
        if self.expands:
            widths[places] = lengths_of_images(places, held, by_sample, lengths, self.group.rank)
        return widths
