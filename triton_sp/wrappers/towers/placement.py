"""Where the tokens of a vision tower are outside of its blocks, and how they get to their shards and back.

Outside of the blocks a tower embeds patches, and the model around it projects what the tower returns. There are three
ways in which the ranks can share that, and a class for each, with the same five methods:

    Replicated  every rank has all tokens
    Images      each rank has images of its own, whole ones; if there are fewer images than ranks, some have none
    Patches     each rank has its shard of the stream of patches already, see patches.py

    plan          decide how the stream is cut, from what the first block gets
    stream_in     the stream in the segments that another block gets
    enter         rows outside of the blocks to this rank's shard of the stream
    leave         this rank's shard to rows outside of the blocks
    leave_merged  the same of rows that stand for several tokens, as DeepStack's do

A method of the model that makes features chooses the placement and hands it to the tower as a value (see features.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.errors import DisagreementError
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import ALONE, Group
from triton_sp.wrappers.planning import plan_stack
from triton_sp.wrappers.towers.hidden import HiddenShape

_EXTRA = 64  # tokens that an image may have in addition to its patches: CLS, registers


class Streams:
    """The streams of one call of a tower: all are cut alike, but blocks may attend in other segments (windows, images).

    Args:
        group: the ranks that share the tower's tokens.
        choice: how the stream is cut.
        seqused_k: int32 (segments,), how many tokens of each image are real, where images are padded.
    """

    def __init__(self, group: Group, choice: PlanChoice, seqused_k: Tensor | None = None) -> None:
        self.group, self.choice, self.seqused_k = group, choice, seqused_k
        self.by_segments: dict[tuple[int, int], Stream] = {}

    @property
    def first(self) -> Stream:
        """The stream in the segments of the first block."""
        return next(iter(self.by_segments.values()))

    def of(self, cu_seqlens: Tensor, segments: Segments | None = None) -> Stream:
        """The stream in these segments, the same object for every block that has them.

        Args:
            cu_seqlens: int32 (segments + 1,), the tensor that the blocks are given.
            segments: its values, if the host has them.
        """
        key = (cu_seqlens.data_ptr(), len(cu_seqlens))
        if key not in self.by_segments:
            choice = self.choice
            self.by_segments[key] = Stream(
                *(ALONE if choice.plan == "replicate" else self.group, choice.shards, cu_seqlens),
                *(self.seqused_k, segments, choice.plan, choice.chunks, choice.attention),
            )
        return self.by_segments[key]

    def describe(self) -> tuple[str, ...]:
        """How the blocks that have run attended on this rank, each kind once."""
        return tuple(filter(None, dict.fromkeys(stream.describe() for stream in self.by_segments.values())))


@dataclass(eq=False)
class Placement(ABC):
    """Where a tower's tokens are outside of its blocks; see the module.

    Attributes:
        arguments: what the tower's forward is given in addition to the arguments of its call.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def plan(self, stack: Stack, config: SPConfig, hidden: HiddenShape, like: Tensor, cu: Tensor | None) -> Streams:
        """Decide how the stream is cut.

        Args:
            hidden: the shape of the hidden states outside.
            like: a tensor with their channels, dtype and device.
            cu: cu_seqlens of the segments in which the first block attends; None if these are the dense images.
        """

    def stream_in(self, cu_seqlens: Tensor, streams: Streams) -> Stream:
        """The stream in the segments that a block is given."""
        return streams.of(cu_seqlens)

    @abstractmethod
    def enter(self, rows: Tensor, stream: Stream) -> Tensor:
        """This rank's shard (T, C) of the stream, from the rows outside of the blocks."""

    @abstractmethod
    def leave(self, local: Tensor, stream: Stream) -> Tensor:
        """The rows outside of the blocks, from this rank's shard (T, C)."""

    @abstractmethod
    def leave_merged(self, rows: Tensor, stream: Stream, unit: int) -> Tensor:
        """The same of rows that stand for `unit` neighbouring tokens each."""


@dataclass(eq=False)
class Replicated(Placement):
    """Every rank has all tokens outside of the blocks: a tower that is called by itself, or by a composite model of
    which it isn't known where the features go."""

    group: Group

    def plan(self, stack: Stack, config: SPConfig, hidden: HiddenShape, like: Tensor, cu: Tensor | None) -> Streams:
        """Every rank knows all segments."""
        segments = _segments(hidden, cu)
        streams = Streams(self.group, plan_stack(stack, config, self.group, segments, like), hidden.used)
        streams.of(_cu_seqlens(segments, like) if cu is None else cu, segments)
        return streams

    def enter(self, rows: Tensor, stream: Stream) -> Tensor:
        """A slice."""
        return stages.shard(rows, stream)

    def leave(self, local: Tensor, stream: Stream) -> Tensor:
        """A gather."""
        return stages.gather(local, stream)

    def leave_merged(self, rows: Tensor, stream: Stream, unit: int) -> Tensor:
        """A gather."""
        return stages.gather(rows, stream, unit)


@dataclass(eq=False)
class Images(Placement):
    """Each rank has images of its own outside of the blocks, and the blocks' shards are cut anywhere.

    Attributes:
        pixels: the shape of the pixels of the whole batch, (..., channels, height, width), or (patches, channels) where
            they are packed. It bounds the numbers that another rank can truthfully report of its images.
        stand_in: this rank has no image of its own. It runs another rank's first image outside of the blocks and drops
            the result, because it must take part in every collective, also in those that an engine adds.
        tokens: of each rank's own images; known once planned.
    """

    group: Group
    pixels: tuple[int, ...]
    stand_in: bool
    tokens: Shards = field(init=False)
    _dropped: int = field(default=0, init=False)  # tokens of the stand-in, which no block gets
    _streams: dict[tuple[int, int], tuple[Tensor | None, Stream]] = field(default_factory=dict, init=False)

    def plan(self, stack: Stack, config: SPConfig, hidden: HiddenShape, like: Tensor, cu: Tensor | None) -> Streams:
        """The ranks exchange the sizes of their images, because each knows its own only."""
        lengths = [stop - start for start, stop in pairwise(_segments(hidden, cu).starts)]
        used = lengths if hidden.used is None else hidden.used.tolist()
        if self.stand_in:
            self._dropped = hidden.tokens
        by_rank = self._images_of_all([] if self.stand_in else list(zip(lengths, used, strict=True)))
        self.tokens = Shards(tuple(sum(length for length, _ in images) for images in by_rank))
        images = [image for images in by_rank for image in images]
        segments = Segments((0, *accumulate(length for length, _ in images)))
        padded = any(length != real for length, real in images)
        real = torch.tensor([real for _, real in images], dtype=torch.int32, device=like.device) if padded else None
        choice = plan_stack(stack, config, self.group, segments, like, owned=self.tokens)
        streams = Streams(self.group, choice, real)
        first = streams.of(_cu_seqlens(segments, like), segments)
        if cu is not None:
            self._streams[cu.data_ptr(), len(cu)] = cu, first
        return streams

    def stream_in(self, cu_seqlens: Tensor, streams: Streams) -> Stream:
        """A block is given the segments of its rank's images, and those of the others come from them: once for each
        tensor, which is held, so that a recomputation finds it."""
        key = (cu_seqlens.data_ptr(), len(cu_seqlens))
        if key not in self._streams:
            lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
            by_rank = self._images_of_all([] if self.stand_in else [(length, length) for length in lengths])
            segments = Segments((0, *accumulate(length for images in by_rank for length, _ in images)))
            self._streams[key] = cu_seqlens, streams.of(_cu_seqlens(segments, cu_seqlens), segments)
        return self._streams[key][1]

    def _images_of_all(self, own: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """(tokens, real tokens) of each image of each rank, from those of this rank's images."""
        counts = [count for (count,) in collectives.integers_of_all([len(own)], self.group)]
        packed = len(self.pixels) < 4
        self._expect(max(counts) <= math.prod(self.pixels[: -1 if packed else -3]), "images", max(counts))
        filled = own + [(0, 0)] * (max(counts) - len(own))
        rows = collectives.integers_of_all([number for image in filled for number in image], self.group)
        images = [list(zip(row[::2], row[1::2], strict=True))[:count] for row, count in zip(rows, counts, strict=True)]
        longest = max(max(image) for rank in images for image in rank)
        area = math.prod(self.pixels if packed else self.pixels[-2:])
        self._expect(longest <= area + _EXTRA, "tokens of an image", longest)
        return images

    def _expect(self, plausible: bool, what: str, found: int) -> None:
        """Check what other ranks report before memory is allocated for it."""
        if not plausible:
            raise DisagreementError(
                "pixel_values",
                expected=f"ranks that have parts of one batch, pixels of shape {self.pixels}",
                found=f"{found} {what} on a rank",
                remedy="pass every rank of the group the same batch",
                rank=self.group.rank,
            )

    def enter(self, rows: Tensor, stream: Stream) -> Tensor:
        """An exchange from the ranks that have the images to those that have the shards."""
        own = rows[: self.tokens.sizes[self.group.rank]]
        return stages.reshard(own, self.tokens, stream.shards, self.group)

    def leave(self, local: Tensor, stream: Stream) -> Tensor:
        """The exchange back."""
        return self.leave_merged(local, stream, 1)

    def leave_merged(self, rows: Tensor, stream: Stream, unit: int) -> Tensor:
        """The exchange back."""
        rows = stages.reshard(rows, stream.shards.merged(unit), self.tokens.merged(unit), self.group)
        if self._dropped:
            # The stand-in leaves as zeros. They are joined to the (empty) rows that have arrived, so that the backward
            # passes through the exchange on this rank too.
            rows = torch.cat([rows, rows.new_zeros(self._dropped // unit, rows.shape[-1])])
        return rows


def _segments(hidden: HiddenShape, cu_seqlens: Tensor | None) -> Segments:
    """The segments of the first block. This is the one read from the device in a call, where a tower is packed; layers
    that attend in other segments need another, if shards end with segments."""
    return hidden.segments() if cu_seqlens is None else Segments(tuple(cu_seqlens.tolist()))


def _cu_seqlens(segments: Segments, like: Tensor) -> Tensor:
    return torch.tensor(segments.starts, dtype=torch.int32, device=like.device)
