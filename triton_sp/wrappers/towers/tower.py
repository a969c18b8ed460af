"""One call of a vision tower: what its blocks share while they run, and the hidden states that the tower returns."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.install import replaced
from triton_sp.wrappers.scope import AttentionScope
from triton_sp.wrappers.towers.hidden import HiddenShape, real_tokens
from triton_sp.wrappers.towers.placement import Placement, Streams

if TYPE_CHECKING:
    from triton_sp.wrappers.proof.verification import Proof


@dataclass(eq=False)
class TowerPass:
    """One call of a tower. What is planned by the first block is read, and not planned again, by a recomputation.

    Attributes:
        placement: where tokens are outside of the blocks.
        joined: cu_seqlens where the tower joins images into one sequence and does not give its blocks any.
        tally: how many attention layers have come by.
        shape: how hidden states look outside of the blocks.
        dense: whether they are (images, tokens of an image, C), none of them padding.
        streams: the stream of tokens inside of the blocks, in the segments of each kind of block.
        mask: the mask that the first block got; all others must get the same.
        proof: verifies a layer in this call, or None.
        taps: where in memory what a block but the last has returned lies, and that, while it lives.
        forward: the number of the model's forward.
        last_output: what the block before returned, while the forward runs.
    """

    stack: Stack
    config: SPConfig
    placement: Placement
    joined: Tensor | None = None
    proof: Proof | None = None
    forward: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    shape: HiddenShape = field(init=False)
    dense: bool = field(init=False)
    streams: Streams | None = None
    mask: Tensor | None = None
    last_output: Tensor | None = None
    taps: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    _tables: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _scopes: dict[Stream, AttentionScope] = field(default_factory=dict)

    def plan(self, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
        """Decide how the stream is cut, from the arguments of the first block."""
        self.mask = mask
        block = type(self.stack.blocks[0]).__name__
        real = None if mask is None or self.joined is not None else real_tokens(mask, hidden, block)
        self.shape = HiddenShape(hidden.shape, hidden.device, self.stack.tokens_first, real)
        cu_seqlens = self.joined if cu_seqlens is None else cu_seqlens
        self.dense = hidden.ndim == 3 and cu_seqlens is None and real is None and not self.stack.tokens_first
        self.streams = self.placement.plan(self.stack, self.config, self.shape, hidden, cu_seqlens)

    def is_planned_for(self, mask: Tensor) -> bool:
        """Whether a block's mask is the first block's. (Reentrant checkpoints hand on another tensor of its memory.)"""
        return self.mask is not None and (self.mask.shape, self.mask.data_ptr()) == (mask.shape, mask.data_ptr())

    def stream(self, cu_seqlens: Tensor | None = None) -> Stream:
        """The stream in the segments that a block is given; by default in those of the first block."""
        assert self.streams is not None
        return self.streams.first if cu_seqlens is None else self.placement.stream_in(cu_seqlens, self.streams)

    def scope(self, stream: Stream, attention: Sequence[nn.Module]) -> AttentionScope:
        """The scope of a block's attention modules. Blocks of one stream share what graphs take it by, which would take
        30 us for each of them (measured)."""
        if stream not in self._scopes:
            self._scopes[stream] = AttentionScope(
                stream, self.tally, proof=self.proof, forward=self.forward
            ).traceable()
        return replace(self._scopes[stream], attention=attention)

    def enter(self, hidden: Tensor) -> Tensor:
        """What the blocks run on, from the hidden states outside."""
        return self.shape.local(self.placement.enter(self.shape.flat(hidden), self.stream()))

    def whole(self, x: Any) -> Any:
        """Lists of what blocks have returned (DeepStack's levels), as they are outside of the blocks."""
        if isinstance(x, list | tuple) and x and all(isinstance(part, Tensor) for part in x):
            taps = [self.taps.get(part.data_ptr()) for part in x]
            if all(tap is not None and tap() is part for tap, part in zip(taps, x, strict=True)):
                return type(x)(map(self.leave, x))
        return x

    def leave(self, local: Tensor) -> Tensor:
        """The hidden states outside, from what a block returned."""
        return self.shape.restore(self.placement.leave(self.shape.rows(local), self.stream()))

    def table(self, x: Tensor, prefix: float = 0.0) -> Tensor:
        """The rows for the blocks' tokens of a tensor that has a row for each token outside, such as rotations: in the
        shape of the hidden states, (T, ...) of packed tokens, or (L, C) where all images have the same rows. Of these a
        tower may have fewer than tokens: those before the patches (CLS, registers) get rows of `prefix`."""
        if self.dense and x.ndim == 2:
            missing = x.new_full((self.shape.length - len(x), x.shape[1]), prefix)
            return torch.cat([missing, x])[self.index_in_image()]
        # Every block gets the same one: it is exchanged once. It is held, so that its memory is not given to another.
        # (Its rows may be a copy on some ranks and none on others, so they do not tell whether it is the same.)
        key = (x.data_ptr(), x.shape, x.stride())
        if key not in self._tables:
            shaped = x.ndim == len(self.shape.shape) and x.shape[:-1] == self.shape.shape[:-1]
            rows = self.placement.enter(self.shape.flat(x) if shaped else x, self.stream())
            self._tables[key] = x, self.shape.local(rows) if shaped else rows
        return self._tables[key][1]

    def index_in_image(self) -> Tensor:
        """(T,) which token of its image each of this rank's tokens is, where all images have as many."""
        own = self.stream().own
        return torch.arange(own.start, own.stop, device=self.shape.device) % self.shape.length


@contextmanager
def without_dense_mask(tower: TowerPass) -> Iterator[None]:
    """Keep a tower that joins images from making a mask (T, T) of all patches while it runs: the stream's segments say
    the same.

    Such towers make no mask if their configuration names flash attention. Their attention modules have a configuration
    of their own, so that this changes nothing else.
    """
    if tower.joined is None:
        yield
        return
    module: Any = tower.stack.module
    config = copy.copy(module.config)
    config._attn_implementation_internal = "flash_attention_2"
    with replaced(module, "config", config):
        yield


class TowerStates(tuple[Tensor, ...]):
    """A tower's `hidden_states`. To index it is a collective: all ranks of the group must read the same entries.

    The states from between blocks hold this rank's tokens. They leave the blocks when they are read, so that only those
    are moved that the model uses (LLaVA reads one, most models none). Entry 0 went into the first block and the last
    entry came out of the last block, so that these two are as outside of the blocks already.
    """

    _tower: TowerPass | None

    # An engine that rebuilds tuples (ZeRO 3) makes one of what it has read from this one: there all states have left
    # the blocks, and `tower` is None.
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
        between = 0 < index % len(self) < len(self._tower.stack.blocks)
        return self._tower.leave(state) if between and state is not None else state

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))
