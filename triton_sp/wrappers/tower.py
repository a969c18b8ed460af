"""One call of a vision tower: where its tokens are outside of its blocks, and how they are cut inside.

Outside, where the tower embeds patches and the model projects its result, one of three is true (`Outside`):

    whole     every rank has all tokens; the way of a tower alone, and of composites whose seam is not known
    images    each rank has images of its own, whole ones; where there are fewer than ranks, some have none
    patches   each rank has its part of the stream of patches, cut anywhere between merge units
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.errors import DisagreementError, UnsupportedModelError
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import ALONE, Group
from triton_sp.wrappers.planning import plan_tower

Outside = Literal["whole", "images", "patches"]
_EXTRA = 64  # tokens of an image beside its patches: CLS, registers


@dataclass
class Layout:
    """How the hidden states looked before the first block.

    (T, C) or (1, T, C), packed, or a segment of N tokens for each of B images: (B, N, C), or (N, B, C) if
    `tokens_first`.

    Where images are padded to one size, blocks get a mask: padding sees the image, but is seen by nothing. In the
    stream each image's real tokens come first then, so that they are a range.

    Attributes:
        real: (B, N) bool, the tokens that are not padding; None if none is.
    """

    shape: torch.Size
    device: torch.device
    tokens_first: bool = False
    real: Tensor | None = None

    @cached_property
    def order(self) -> Tensor | None:
        """(B N), which token of the images each of the stream is."""
        if self.real is None:
            return None
        first = torch.arange(0, self.tokens, self.length, device=self.device)[:, None]
        return (first + (~self.real).int().argsort(dim=1, stable=True)).flatten()

    @property
    def tokens(self) -> int:
        return self.shape[:-1].numel()

    @property
    def length(self) -> int:
        """Tokens of an image; of the whole stream if it is packed."""
        return self.shape[0 if self.tokens_first else -2]

    def images(self) -> Segments:
        """The segments of dense images; packed towers hand theirs to each block."""
        return Segments(tuple(range(0, self.tokens + 1, max(self.length, 1))))

    def flat(self, hidden: Tensor) -> Tensor:
        """The stream (S, C) of all tokens, image after image."""
        tokens_SC = (hidden.transpose(0, 1) if self.tokens_first else hidden).flatten(0, -2)
        return tokens_SC if self.order is None else tokens_SC[self.order]

    def restore(self, tokens_SC: Tensor) -> Tensor:
        """The adjoint of `flat`."""
        if self.order is not None:
            tokens_SC = tokens_SC[self.order.argsort()]
        if self.tokens_first:
            return tokens_SC.unflatten(0, self.shape[1::-1]).transpose(0, 1)
        return tokens_SC.unflatten(0, self.shape[:-1])

    def local(self, tokens_TC: Tensor) -> Tensor:
        """A rank's tokens as the blocks want them: like one image."""
        if len(self.shape) == 2:
            return tokens_TC
        return tokens_TC[:, None] if self.tokens_first else tokens_TC[None]


@dataclass(eq=False)
class TowerPass:
    """One call of a tower. Layout, choice and streams are written by the first block, and not by a recomputation;
    where patches are cut outside already, by `cut_patches`.

    Attributes:
        stand_in: this rank has no image of its own, and runs what is outside of the blocks on another's, to no effect.
        pixels: the shape of those of the whole batch where ranks have images of their own: it bounds what they tell.
        layout: how hidden states look outside of the blocks.
        owned: tokens of each rank outside of the blocks, where these are its images'.
        frames: where patches are cut outside, the frames that this rank has patches of, see `Patches.frames`.
        mask: the one that the first block got; all others must get the same.
        joined: cu_seqlens of a tower that packs images and tells its blocks by a mask, or not at all.
        seqused_k: how many tokens of each image are real, where images are padded.
    """

    group: Group
    stack: Stack
    config: SPConfig
    outside: Outside = "whole"
    stand_in: bool = False
    pixels: tuple[int, ...] = ()
    tally: Counter[str] = field(default_factory=Counter)
    layout: Layout | None = None
    owned: Shards | None = None
    frames: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    joined: Tensor | None = None
    seqused_k: Tensor | None = None
    choice: PlanChoice | None = None
    streams: dict[tuple[int, int], Stream] = field(default_factory=dict)
    tables: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = field(default_factory=dict)
    last_output: Tensor | None = None  # of the block before, while the forward runs

    def plan(self, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
        """Decide how the stream is cut, from the segments that the first block attends in."""
        if self.outside == "patches":
            return
        self.mask = mask
        block = type(self.stack.blocks[0]).__name__
        real = None if mask is None or self.joined is not None else real_tokens(mask, hidden, block)
        layout = self.layout = Layout(hidden.shape, hidden.device, self.stack.tokens_first, real)
        self.streams.clear()
        self.seqused_k = None if real is None else real.sum(1, dtype=torch.int32)
        cu_seqlens = self.joined if cu_seqlens is None else cu_seqlens
        # The one host read of a call; layers whose segments are others need another, if shards end with segments.
        known = layout.images() if cu_seqlens is None else Segments(tuple(cu_seqlens.tolist()))
        if self.outside == "images":
            known, cu_seqlens = self._join_images(known), None
        if cu_seqlens is None:
            cu_seqlens = torch.tensor(known.starts, dtype=torch.int32, device=hidden.device)
        self.choice = plan_tower(self.stack, self.config, self.group, known, hidden, self.owned)
        self.stream(cu_seqlens, known)

    def is_planned_for(self, mask: Tensor) -> bool:
        """Whether a block's mask is the first block's. (Reentrant checkpoints hand on another tensor of its memory.)"""
        return self.mask is not None and (self.mask.shape, self.mask.data_ptr()) == (mask.shape, mask.data_ptr())

    def _join_images(self, own: Segments) -> Segments:
        """The segments of all ranks' images, of which this rank knows its own; `owned` and `seqused_k` too."""
        lengths = [] if self.stand_in else [stop - start for start, stop in pairwise(own.starts)]
        used = lengths if self.seqused_k is None else self.seqused_k.tolist()[: len(lengths)]
        most = max(count for (count,) in collectives.integers_of_all([len(lengths)], self.group))
        self._expect(most <= math.prod(self.pixels[:-3]), "images", most)
        filled = [(*pair, 1) for pair in zip(lengths, used, strict=True)] + [(0, 0, 0)] * (most - len(lengths))
        told = collectives.integers_of_all([number for entry in filled for number in entry], self.group)
        ranks = [[tuple(row[i : i + 2]) for i in range(0, len(row), 3) if row[i + 2]] for row in told]
        self.owned = Shards(tuple(sum(length for length, _ in rank) for rank in ranks))
        images = [image for rank in ranks for image in rank]
        longest = max(max(image) for image in images)
        self._expect(longest <= math.prod(self.pixels[-2:]) + _EXTRA, "tokens of an image", longest)
        assert self.layout is not None
        real = torch.tensor([real for _, real in images], dtype=torch.int32, device=self.layout.device)
        self.seqused_k = real if any(length != real for length, real in images) else None
        return Segments((0, *accumulate(length for length, _ in images)))

    def _expect(self, plausible: bool, what: str, found: int) -> None:
        """What other ranks tell of their images, before memory is taken for it."""
        if not plausible:
            raise DisagreementError(
                "pixel_values",
                expected=f"ranks that have parts of one batch, pixels of shape {self.pixels}",
                found=f"{found} {what} on a rank",
                remedy="pass every rank of the group the same batch",
                rank=self.group.rank,
            )

    def cut_patches(self, choice: PlanChoice, streams: list[tuple[Tensor, Segments]]) -> None:
        """Settle the cut before the patches are embedded, and the segments that blocks will ask for."""
        self.choice = choice
        for cu_seqlens, known in streams:
            self.stream(cu_seqlens, known)

    def stream(self, cu_seqlens: Tensor | None = None, known: Segments | None = None) -> Stream:
        """The stream with these segments, the same object in every layer that has them; without cu_seqlens, and where
        ranks have joined their images' segments, the first block's."""
        assert self.choice is not None
        if cu_seqlens is None or (self.streams and self.outside == "images"):
            return next(iter(self.streams.values()))
        key = (cu_seqlens.data_ptr(), len(cu_seqlens))
        if key not in self.streams:
            group = ALONE if self.choice.plan == "replicate" else self.group
            self.streams[key] = Stream(
                *(group, self.choice.shards, cu_seqlens, self.seqused_k, known),
                plan=self.choice.plan,
                chunks=self.choice.chunks,
            )
        return self.streams[key]

    def table(self, x: Tensor) -> Tensor:
        """The rows for the blocks' tokens of a tensor that has a row for each token outside, such as rotations."""
        if self.outside == "patches":
            return x
        if self.owned is None:
            return stages.shard(x, self.stream())
        key = (x.data_ptr(), x.shape)
        if key not in self.tables:  # every block gets the same; x is held, so that its memory is not another's
            own = x[: self.owned.sizes[self.group.rank]]
            self.tables[key] = x, stages.reshard(own, self.owned, self.stream().shards, self.group)
        return self.tables[key][1]

    def enter(self, hidden: Tensor) -> Tensor:
        """What the blocks run on, from the hidden states outside."""
        if self.outside == "patches":
            return hidden
        assert self.layout is not None
        rows, stream = self.layout.flat(hidden), self.stream()
        if self.owned is None:
            return self.layout.local(stages.shard(rows, stream))
        own = rows[: self.owned.sizes[self.group.rank]]
        return self.layout.local(stages.reshard(own, self.owned, stream.shards, self.group))

    def leave(self, local: Tensor) -> Tensor:
        """The hidden states outside, shaped as they were there, from what a block returned."""
        if self.outside == "patches":
            return local
        assert self.layout is not None
        rows, stream = local.flatten(0, -2), self.stream()
        if self.owned is None:
            return self.layout.restore(stages.gather(rows, stream))
        rows = stages.reshard(rows, stream.shards, self.owned, self.group)
        if self.stand_in:  # joined to nothing, so that this rank takes part in the exchange of the backward
            rows = torch.cat([rows, rows.new_zeros(self.layout.tokens, rows.shape[-1])])
        return self.layout.restore(rows)


@contextmanager
def without_dense_mask(tower: TowerPass) -> Iterator[None]:
    """While a packed tower runs: keep it from making a mask (T, T) of all patches, which the stream does not need.

    Such towers make none for flash attention; their blocks have a configuration of their own.
    """
    module: Any = tower.stack.module
    config = module.config
    if tower.joined is not None:
        module.config = copy.copy(config)
        module.config._attn_implementation_internal = "flash_attention_2"
    try:
        yield
    finally:
        module.config = config


def real_tokens(mask: Tensor, hidden: Tensor, block: str) -> Tensor | None:
    """(B, N) bool, the tokens that a block's mask lets all others see; None if these are all.

    Args:
        mask: (B, N), non-zero at real tokens, or (B, 1, N or 1, N), bool or added to scores, alike for all rows.

    Raises:
        UnsupportedModelError: a mask of another kind.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.ndim == 2:
        seen = mask.bool()[:, None, None]
    shape = (*hidden.shape[:1], 1, hidden.shape[1]) if hidden.ndim == 3 else ()
    if seen.ndim != 4 or (seen.shape[0], seen.shape[1], seen.shape[3]) != shape or bool((seen != seen[:, :, :1]).any()):
        raise UnsupportedModelError(
            block,
            expected="a mask of padded patches, alike for all patches of an image",
            found=f"one of shape {tuple(mask.shape)}",
            remedy="this kind of mask is not handled; call without it",
        )
    real = seen[:, 0, 0]
    return None if bool(real.all()) else real


class TowerStates(tuple[Tensor, ...]):
    """A tower's `hidden_states`. The ones from between blocks hold a rank's tokens and leave the blocks when read."""

    _tower: TowerPass | None

    # ZeRO 3 makes a new one of what it has read from this one: there all have left the blocks.
    def __new__(cls, states: Iterable[Tensor], tower: TowerPass | None = None) -> TowerStates:
        self = super().__new__(cls, states)
        self._tower = tower
        return self

    @overload
    def __getitem__(self, index: Any) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        state = super().__getitem__(index)
        if self._tower is None:
            return state
        # Entry 0 went into the first block and entry n came out of the last: both are as outside of the blocks.
        between = 0 < index % len(self) < len(self._tower.stack.blocks)
        return self._tower.leave(state) if between and state is not None else state

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))
