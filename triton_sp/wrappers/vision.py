"""Vision towers: sharded before the first block, whole again after the last.

A tower's own forward runs on every rank. Its first block takes the rank's part of the patches of the whole batch (a
CLS token is a token like another), every block runs on that part, and the last one gathers. What a tower reads from
between its blocks (DeepStack mergers, LLaVA's second to last hidden state) is gathered when it is read.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from triton_sp import pipeline
from triton_sp.comm import ALONE, Group
from triton_sp.cost import Choice
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.models import Stack
from triton_sp.pipeline import Stream
from triton_sp.plan import Segments
from triton_sp.wrappers import opaque
from triton_sp.wrappers.attention import redirect
from triton_sp.wrappers.install import Installation, LastCall, Override, SPConfig
from triton_sp.wrappers.planning import plan_tower
from triton_sp.wrappers.scope import (
    AttentionScope,
    Call,
    active,
    bound_checkpoints,
    check_tally,
    current,
    outside,
    recomputing,
)


@dataclass
class Layout:
    """How the hidden states looked before the first block.

    (T, C), or a segment of N tokens for each of B images: (B, N, C), or (N, B, C) if `tokens_first`.
    """

    shape: torch.Size
    device: torch.device
    tokens_first: bool = False

    @property
    def tokens(self) -> int:
        return self.shape[:-1].numel()

    @property
    def length(self) -> int:
        """Tokens of an image; of the whole stream if it is packed."""
        return self.shape[0 if self.tokens_first else -2]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """The segments of dense hidden states; packed towers hand theirs to each block."""
        return torch.tensor(self.segments.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def segments(self) -> Segments:
        return Segments(tuple(range(0, self.tokens + 1, max(self.length, 1))))

    def flat(self, hidden: Tensor) -> Tensor:
        """The stream (S, C) of all tokens, image after image."""
        return (hidden.transpose(0, 1) if self.tokens_first else hidden).flatten(0, -2)

    def restore(self, tokens_SC: Tensor) -> Tensor:
        """The adjoint of `flat`."""
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
    """One call of a tower. Layout, choice and streams are written by the first block, and not by a recomputation."""

    group: Group
    stack: Stack
    config: SPConfig
    tally: Counter[str] = field(default_factory=Counter)
    layout: Layout | None = None
    choice: Choice | None = None
    streams: dict[tuple[int, int], Stream] = field(default_factory=dict)
    last_output: Tensor | None = None  # of the block before, while the forward runs

    def plan(self, hidden: Tensor, cu_seqlens: Tensor | None) -> None:
        """Decide how the stream is cut, from the segments that the first block attends in."""
        layout = self.layout = Layout(hidden.shape, hidden.device, self.stack.tokens_first)
        self.streams.clear()
        # The one host read of a call; layers whose segments are others need another, if shards end with segments.
        segments = layout.segments if cu_seqlens is None else Segments(tuple(cu_seqlens.tolist()))
        self.choice = plan_tower(self.stack, self.config, self.group, segments, hidden)
        self.stream(cu_seqlens, segments)

    def stream(self, cu_seqlens: Tensor | None = None, known: Segments | None = None) -> Stream:
        """The stream with these segments, the same object in every layer that has them."""
        assert self.layout is not None and self.choice is not None
        if cu_seqlens is None:
            cu_seqlens, known = self.layout.cu_seqlens, self.layout.segments
        key = (cu_seqlens.data_ptr(), len(cu_seqlens))
        if key not in self.streams:
            group = ALONE if self.choice.plan == "replicate" else self.group
            self.streams[key] = Stream(
                group, self.choice.shards, cu_seqlens, known=known, plan=self.choice.plan, chunks=self.choice.chunks
            )
        return self.streams[key]

    def whole(self, local: Tensor) -> Tensor:
        """The hidden states of all patches, shaped as they were before the first block."""
        assert self.layout is not None
        return self.layout.restore(pipeline.gather(local.flatten(0, -2), self.stream()))


def install(stack: Stack, installation: Installation) -> None:
    """Override a tower's forward, its blocks, its taps and its attention."""
    if stack.door:
        redirect(stack.attention, installation)
    else:
        for unit in stack.attention:
            if unit not in stack.blocks:
                installation.override(unit, opaque.run_unit)
    for block in stack.blocks:
        installation.override(block, _run_block)
    for tap in stack.taps:
        installation.override(tap, _run_tap)
    installation.override(stack.module, _run_tower)


def _stack_of(override: Override) -> Stack:
    module = override.module
    towers = override.installation.anatomy.towers
    return next(t for t in towers if t.module is module or any(m is module for m in (*t.blocks, *t.taps)))


def _run_tower(override: Override, *args: Any, **kwargs: Any) -> Any:
    if current(Call) is None:
        outside(override.module)
        return override.original(*args, **kwargs)
    stack = _stack_of(override)
    tower = TowerPass(override.installation.group, stack, override.installation.config)
    with active(tower), bound_checkpoints(stack.module), nullcontext() if stack.door else opaque.no_fast_path():
        out = override.original(*args, **kwargs)
    tower.last_output = None
    layers = len(stack.attention if stack.door else stack.blocks)
    check_tally(tower.tally, layers, stack.name)
    if tower.choice is not None:
        attended = tuple(filter(None, dict.fromkeys(stream.describe() for stream in tower.streams.values())))
        override.installation.last_calls[stack.name] = LastCall(tower.choice, attended)
    states = getattr(out, "hidden_states", None)
    if isinstance(states, tuple):
        out.hidden_states = GatheredStates(states, tower)
    return out


def _run_block(override: Override, *args: Any, **kwargs: Any) -> Any:
    tower = current(TowerPass)
    if tower is None:
        outside(override.module)
        return override.original(*args, **kwargs)
    blocks = tower.stack.blocks
    first, last = override.module is blocks[0], override.module is blocks[-1]
    arguments = override.bind(args, kwargs)
    name = next(iter(override.__signature__.parameters))
    hidden = arguments.pop(name)
    if first:
        _check_unit(tower, hidden)
    if first and not recomputing():
        tower.plan(hidden, arguments.get("cu_seqlens"))
    else:
        _check_chain(tower, override.module, hidden)

    stream = tower.stream(arguments.get("cu_seqlens"))
    if first and tower.layout is not None:
        hidden = tower.layout.local(pipeline.shard(tower.layout.flat(hidden), stream))
    if tower.stack.door:
        _localise(arguments, stream, override.module)
        with active(AttentionScope(stream, tower.tally)):
            out = override.original(hidden, **arguments)
    else:
        out = opaque.run_block(override, tower, hidden, arguments)
    local = out[0] if isinstance(out, tuple) else out
    tower.last_output = local.detach()
    if last:
        local = tower.whole(local)
    return (local, *out[1:]) if isinstance(out, tuple) else local


def _check_unit(tower: TowerPass, hidden: Tensor) -> None:
    if hidden.shape[:-1].numel() % tower.stack.unit:
        raise InputError(
            "pixel_values",
            expected=f"a number of patches that is a multiple of {tower.stack.unit}",
            found=f"{hidden.shape[:-1].numel()}",
            remedy="use the model's own image processor",
        )


def _check_chain(tower: TowerPass, block: nn.Module, hidden: Tensor) -> None:
    """Each block must get exactly what the block before returned, or what happened in between ran on a shard."""
    before = tower.last_output
    if before is None or recomputing():  # which starts anywhere
        return
    if before.shape != hidden.shape or before.data_ptr() != hidden.data_ptr():
        raise UnsupportedModelError(
            type(block).__name__,
            expected="blocks that follow one another directly",
            found=f"hidden states {tuple(hidden.shape)} that are not what the block before returned",
            remedy="this tower changes hidden states between its blocks and cannot be sharded",
        )


def _localise(arguments: dict[str, Any], stream: Stream, block: nn.Module) -> None:
    """Replace what describes the whole stream by what describes this rank's tokens."""
    tokens = len(stream.shards.range(stream.group.rank))
    for name in ("position_embeddings", "rotary_pos_emb"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            arguments[name] = pipeline.shard(value, stream)
        elif value is not None:
            arguments[name] = tuple(pipeline.shard(part, stream) for part in value)
    if arguments.get("cu_seqlens") is not None:
        # On the CPU: the block asks for its values, to loop over segments. Ours is one, so it makes one call.
        arguments["cu_seqlens"] = torch.tensor([0, tokens], dtype=torch.int32)
    for name in ("attention_mask", "causal_attention_mask", "head_mask", "layer_head_mask"):
        if arguments.get(name) is not None:
            raise UnsupportedModelError(
                type(block).__name__,
                expected=f"no {name}",
                found=f"one of shape {tuple(arguments[name].shape)}",
                remedy="masked patches are not handled; pass images of one size, or call without the mask",
            )
    if arguments.get("output_attentions"):
        raise InputError(
            "output_attentions",
            expected="False",
            found="True",
            remedy="attention weights are never formed; call triton_sp.unwrap(model) to look at them",
        )


def _run_tap(override: Override, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A module between blocks: run on the rank's tokens, `unit` of which become one row; its rows are gathered."""
    tower = current(TowerPass)
    if tower is None:
        return override.original(hidden, *args, **kwargs)
    if hidden.shape[0] == tower.stream().shards.total:  # after the last block the hidden states are whole
        return override.original(hidden, *args, **kwargs)
    return pipeline.gather(override.original(hidden, *args, **kwargs), tower.stream(), tower.stack.unit)


class GatheredStates(tuple[Tensor, ...]):
    """A tower's `hidden_states`. The ones from between blocks hold a rank's patches and are gathered when read."""

    _tower: TowerPass

    def __new__(cls, states: tuple[Tensor, ...], tower: TowerPass) -> GatheredStates:
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
        # Entry 0 went into the first block and entry n came out of the last: both are whole.
        between = 0 < index % len(self) < len(self._tower.stack.blocks)
        return self._tower.whole(state) if between and state is not None else state

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))
