"""Layers that are alike are followed once: what the others allocate, send and compute is told from that one.

The first layers of a stack and its last run as ever. A layer that is like one before, with arguments like that one's,
is tried out by itself, forward and backward. It and all that are like it are then one operation each, which keeps as
many bytes for the backward, raises the peak as much, and is counted as as many FLOPs and collectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from triton_sp import loss
from triton_sp.forecast.hollow import Hollow
from triton_sp.forecast.likeness import Form, form_of, identity, kind_of, looks
from triton_sp.ranks.collectives import Ledger
from triton_sp.wrappers.install import Installation, replaced
from triton_sp.wrappers.scope import current, recomputing
from triton_sp.wrappers.towers.tower import TowerPass

_BYTE = torch.float8_e4m3fn  # a float, so that nobody touches it
# So many chunks of logits are told of. Fewer are not, because how their gradients of the head's weight are added up
# is not told of.
_MANY = 32


class _Span(NamedTuple):
    """What happened from one moment to another: the most bytes above those at its start, FLOPs, and collectives."""

    peak: int
    flops: int
    entries: list[tuple[str, int]]


class _Told(NamedTuple):
    """What one layer did, and so will those like it: the form of its result; the bytes that it keeps for the
    backward beside its input, and those that go to the CPU; its forward, its backward, and how many attention layers
    came by."""

    out: Form
    kept: int
    moved: int
    forward: _Span
    backward: _Span | None
    calls: Counter[str]


class Alike:
    """Follows a step of training within a `Hollow` and a ledger, and keeps both up."""

    def __init__(self, hollow: Hollow, ledger: Ledger, installation: Installation) -> None:
        self.hollow, self.ledger, self.installation = hollow, ledger, installation
        self.leaf = torch.zeros((), requires_grad=True)
        self.seen: set[Any] = set()
        self.told: dict[Any, _Told | None] = {}
        self.start, self.span = (0, 0, 0), _Span(0, 0, [])  # of the backward that is tried out

    @contextmanager
    def following(self) -> Iterator[None]:
        """While the wrapped model runs: its layers, and the chunks of its loss."""
        with ExitStack() as stack:
            for blocks in (s.blocks for s in self.installation.anatomy.stacks if s.by_interface):
                for block in blocks[1:-1]:
                    run = partial(self._run_layer, kind_of(block), block.forward)
                    stack.enter_context(replaced(block, "forward", run))
            stack.enter_context(mock.patch.object(loss, "checkpoint", partial(self._run_chunk, loss.checkpoint)))
            stack.enter_context(mock.patch.object(loss, "slices", partial(_few, loss.slices)))
            yield

    def _run_chunk(self, checkpoint: Callable[..., Any], part: Any, *chunk: Tensor, **options: Any) -> Any:
        run, hidden = partial(checkpoint, part, **options), chunk[0]
        whole = hidden.untyped_storage().nbytes() // hidden.itemsize
        # The last one makes the gradient of the head's weight, which then waits for those of the others.
        last = hidden.storage_offset() + hidden.numel() == whole
        told = whole > _MANY * hidden.numel() and not last
        return self._run(("chunk", *map(looks, chunk)) if told else None, run, *chunk)

    def _run_layer(self, kind: Any, forward: Callable[..., Any], hidden: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*map(identity, args), *map(identity, kwargs.values())]
        usual = isinstance(hidden, Tensor) and not getattr(current(object), "records_routers", False)
        key = (kind, looks(hidden), *given, *kwargs) if usual and None not in given else None
        return self._run(key, partial(forward, **kwargs), hidden, *args)

    def _run(self, key: Any, forward: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        if key is None or recomputing() or not torch.is_grad_enabled():
            return forward(hidden, *args)
        if key in self.seen and key not in self.told:
            self.told[key] = self._try(forward, hidden, args)
        self.seen.add(key)
        told = self.told.get(key)
        return forward(hidden, *args) if told is None else self._tell(told, hidden)

    def _try(self, forward: Callable[..., Any], hidden: Tensor, args: Sequence[Any]) -> _Told | None:
        """What a layer does, by itself; None if that is not known of its kind. Afterwards all is as before."""
        hollow, tower, tally, moved = self.hollow, current(TowerPass), _tally(), self.installation.offloaded
        peak, calls, last = hollow.peak, Counter(tally), tower and tower.last_output
        given: Any = hidden.detach()  # what is before it takes no part
        given = _End.apply(given, self.leaf, self) if hidden.requires_grad else given
        first = start = self.begin()
        out: Any = forward(given, *args)
        if tower is not None:
            tower.last_output = last
        span, grown = self.since(start), hollow.now - start[0]
        gone, self.installation.offloaded = self.installation.offloaded - moved, moved
        told = None
        if isinstance(out, Tensor) and out.data_ptr() != hidden.data_ptr():
            told = _Told(form_of(out), grown - out.untyped_storage().nbytes(), gone, span, None, tally - calls)
            if out.requires_grad:
                edge = get_gradient_edge(_Start.apply(out, self))
                del out
                torch.autograd.backward(edge, torch.ones(()))
                told = told._replace(backward=self.span)
        tally.clear()
        tally.update(calls)
        del self.ledger.entries[first[2] :]
        hollow.peak, hollow.flops = peak, first[1]
        return told

    def _tell(self, told: _Told, hidden: Tensor) -> Any:
        peak, now, tower, moved = self.hollow.peak, self.hollow.now, current(TowerPass), self.installation.offloaded
        out: Any = _Copy.apply(hidden, None if told.backward is None else self.leaf, told, self)
        self.hollow.peak, self.installation.offloaded = peak, moved + told.moved
        self.add(told.forward, now)
        _tally().update(told.calls)
        if tower is not None:
            tower.last_output = out.detach()
        return out

    def begin(self) -> tuple[int, int, int]:
        """A moment, from which on the peak is counted anew."""
        self.hollow.peak = self.hollow.now
        return self.hollow.now, self.hollow.flops, len(self.ledger.entries)

    def since(self, start: tuple[int, int, int]) -> _Span:
        """What has happened since then."""
        return _Span(self.hollow.peak - start[0], self.hollow.flops - start[1], self.ledger.entries[start[2] :])

    def add(self, span: _Span | None, now: int) -> None:
        """Let it happen once more, from so many bytes on."""
        assert span is not None
        self.hollow.peak = max(self.hollow.peak, now + span.peak)
        self.hollow.flops += span.flops
        self.ledger.entries += span.entries


class _Copy(torch.autograd.Function):
    """A layer that is told of: it keeps its input, and a tensor as large as what else a layer keeps."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaf: Tensor | None, told: _Told, alike: Alike) -> Tensor:
        ctx.told, ctx.alike = told, alike
        ctx.save_for_backward(hidden, *([torch.empty(told.kept, dtype=_BYTE)] if told.kept > 0 else []))
        return told.out.new()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ctx.alike.add(ctx.told.backward, ctx.alike.hollow.now)
        hidden = ctx.saved_tensors[0]
        return torch.empty_like(hidden) if ctx.needs_input_grad[0] else None, None, None, None


class _Start(torch.autograd.Function):
    """Behind a layer that is tried out: where its backward begins, once the gradient of its result is there."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, alike: Alike) -> Tensor:
        ctx.out, ctx.alike = form_of(out), alike
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = ctx.out.new()
        ctx.alike.start = ctx.alike.begin()
        return grad, None


class _End(torch.autograd.Function):
    """Before it: where its backward ends."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaf: Tensor, alike: Alike) -> Tensor:
        ctx.alike = alike
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        ctx.alike.span = ctx.alike.since(ctx.alike.start)
        return None, None, None


def _tally() -> Counter[str]:
    scope: Any = current(object)
    return scope.tally if hasattr(scope, "tally") else Counter()


def _few(slices: Callable[..., Any], tokens: int, rows: int) -> Any:
    """Chunks of logits of which nothing is left but a number: from the second on, all take the same memory."""
    found = slices(tokens, rows)
    return found if len(found) < 5 else [*found[:3], found[-1]]
