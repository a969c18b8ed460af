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

from triton_sp.errors import InputError
from triton_sp.modules.fused import Fused, FusedLayout, text_rows
from triton_sp.ops.splice import splice
from triton_sp.plan.shards import Shards, shard_tokens
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
        layout, owner, place = self._lay_out(ids, held, visual.ndim == 3, image_lengths)
        own = layout.shards.range(self.group.rank)
        columns = slice(own.start, own.stop)
        arrived, order = self._route(visual.flatten(0, -2), layout, owner, place)

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
            raise InputError("input_ids", expected="integers (B, L)", found=_shown(ids), remedy="pass a batch of ids")
        if isinstance(text, Tensor) and (text.ndim != 3 or text.shape[:2] != ids.shape):
            raise InputError(
                "text_embeds",
                expected=f"{(*ids.shape, 'C')}, an embedding for each of input_ids",
                found=_shown(text),
                remedy="embed the whole text, placeholders by any id, or pass the embedding module",
            )
        if visual.ndim not in (2, 3) or (visual.ndim == 3 and len(visual) != len(ids)):
            raise InputError(
                "visual_features",
                expected=f"({len(ids)}, v, C) or (v, C)",
                found=_shown(visual),
                remedy="pass this rank's features of each sample, or of all images of the batch in one stream",
            )
        if mask is not None and mask.shape != ids.shape:
            raise InputError(
                "attention_mask", expected=f"{tuple(ids.shape)}", found=_shown(mask), remedy="pass one entry a token"
            )
        self.placeholders(ids.detach().cpu())

    def _lay_out(
        self, ids: Tensor, held: list[int], by_sample: bool, lengths: Sequence[int] | None
    ) -> tuple[FusedLayout, Tensor, Tensor]:
        """The layout of the batch, and of each token of the visual stream its owner and the row that has it there."""
        places = self.placeholders(ids)
        used = places.any(1)
        widths = torch.ones_like(ids)
        widths[places] = self._widths(places, sum(held), by_sample, lengths)
        samples = widths.where(places, 0).sum(1)
        uneven = by_sample and bool((samples[used] != sum(held)).any())
        if uneven or int(samples.sum()) != sum(held) * (int(used.sum()) if by_sample else 1):
            raise InputError(
                "visual_features",
                expected=f"{samples.tolist()} features of the samples, as many as their placeholders stand for",
                found=f"{sum(held)} {'of each' if by_sample else 'in all'}, {held} on the ranks",
                remedy="pass the features of exactly these placeholders; of samples with different numbers of them as "
                "one stream (v, C)",
                rank=self.group.rank,
            )
        rank = torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held))
        row = torch.arange(len(rank)) - torch.tensor(Shards(tuple(held)).starts)[rank]
        if by_sample:
            row = (used.nonzero() * torch.tensor(held)[rank] + row).flatten()
            rank = rank.expand(int(used.sum()), -1).flatten()
        totals = widths.sum(1)
        source = torch.full((len(ids), int(totals.max()) if len(ids) else 0), -1)
        for line, width, total in zip(source, widths, totals.tolist(), strict=True):
            line[:total] = torch.repeat_interleave(width)
        visual = places.gather(1, source.clamp(min=0)) & (source >= 0)
        return FusedLayout(source, visual, shard_tokens(source.shape[1], self.group.size)), rank, row

    def _widths(self, places: Tensor, held: int, by_sample: bool, lengths: Sequence[int] | None) -> Tensor:
        """How many visual tokens each placeholder stands for."""
        count = int(places.sum())
        if not self.expands:
            return torch.ones(count, dtype=torch.long)
        if lengths is not None:
            if len(lengths) != count:
                raise InputError(
                    "image_lengths",
                    expected=f"{count}, one for each placeholder",
                    found=f"{len(lengths)}",
                    remedy="pass the number of features of each image",
                    rank=self.group.rank,
                )
            return torch.tensor(lengths, dtype=torch.long)
        images = places.sum(1, keepdim=True).expand_as(places)[places] if by_sample else torch.full((count,), count)
        if bool((held % images).any()):
            raise InputError(
                "visual_features",
                expected=f"a multiple of the {images.unique().tolist()} images",
                found=f"{held} features{' of each sample' * by_sample}",
                remedy="pass image_lengths, the number of features of each image",
                rank=self.group.rank,
            )
        return held // images

    def _route(self, visual_VC: Tensor, layout: FusedLayout, owner: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """One exchange: each rank sends what others' tokens need. What came, and the row of each of this rank's visual
        tokens in it."""
        ranks, me = self.group.size, self.group.rank
        rank_of = torch.repeat_interleave(torch.arange(ranks), torch.tensor(layout.shards.sizes))
        needer = rank_of.expand(len(layout.visual), -1)[layout.visual]
        mine, needed = owner == me, needer == me
        leaving = place[mine][needer[mine].argsort(stable=True)]
        send, receive = (x.bincount(minlength=ranks).tolist() for x in (needer[mine], owner[needed]))
        whole = len(leaving) == len(visual_VC) and bool((leaving.diff() == 1).all())
        leaving = leaving.to(visual_VC.device, non_blocking=True)
        arrived = collectives.exchange(
            visual_VC if whole else visual_VC.index_select(0, leaving), send, receive, self.group
        )
        return arrived, owner[needed].argsort(stable=True).argsort()


def _shown(x: Tensor) -> str:
    return f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}"


class LlavaFusionAdapter(FusionAdapter):
    """LLaVA: each placeholder token stands for a whole image and gives way to its features.

    The arguments are those of FusionAdapter. Samples whose fused length is less than the longest one's are padded at
    their end; `details=True` returns the mask.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> adapter = LlavaFusionAdapter(nn.Identity())
    >>> text = torch.tensor([[[1.0], [0.0], [2.0], [0.0]]])
    >>> visual = torch.tensor([[7.0], [8.0], [9.0]])                     # an image of one feature, one of two
    >>> adapter(visual, text, torch.tensor([[1, -200, 2, -200]]), image_lengths=[1, 2]).flatten().tolist()
    [1.0, 7.0, 2.0, 8.0, 9.0]
    >>> dist.destroy_process_group()
    """

    expands = True


class InternVLFusionAdapter(FusionAdapter):
    """InternVL: `image_token_id` is IMG_CONTEXT, one for each feature. The arguments are those of FusionAdapter."""


class Qwen2VLFusionAdapter(FusionAdapter):
    """Qwen2-VL: the tokens between a vision start and the next vision end are placeholders, one for each feature.

    Args:
        projection, process_group: as for FusionAdapter; the projection is `visual.merger`.
        vision_start_token_id, vision_end_token_id: the ids around the placeholders of an image or video; they stay.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> adapter = Qwen2VLFusionAdapter(nn.Identity(), None, vision_start_token_id=3, vision_end_token_id=4)
    >>> adapter.placeholders(torch.tensor([[5, 3, 1, 1, 4, 5]])).int().tolist()
    [[0, 0, 1, 1, 0, 0]]
    >>> dist.destroy_process_group()
    """

    def __init__(
        self, projection: nn.Module, process_group: Any, vision_start_token_id: int, vision_end_token_id: int
    ) -> None:
        super().__init__(projection, process_group)
        self.vision_start_token_id, self.vision_end_token_id = vision_start_token_id, vision_end_token_id

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool: the tokens between a vision start and the next vision end."""
        start, end = input_ids == self.vision_start_token_id, input_ids == self.vision_end_token_id
        depth = start.long().cumsum(1) - end.long().cumsum(1)
        if bool((depth < 0).any() | (depth > 1).any() | (depth[:, -1:] != 0).any()):
            raise InputError(
                "input_ids",
                expected="a vision end after each vision start",
                found=f"{int(start.sum())} starts and {int(end.sum())} ends, or in another order",
                remedy="pass whole images and videos",
            )
        return (depth == 1) & ~start
