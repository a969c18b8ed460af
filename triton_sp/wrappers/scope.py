"""What a call is about, for code that is reached only through the model's own forward.

A scope is immutable. The vision towers' attention functions get no argument of ours, so theirs is ambient; whatever a
tower checkpoints is bound to the scope it ran in, so that the recomputation in the backward runs in the same one. A
flag that is cleared after the forward, or state on the modules, is not there or is another call's by then (with two
tower calls, image and video, that gave gradients wrong by a factor of 9e4 without an error).
The decoder's attention gets its scope as a keyword, which any kind of checkpointing carries along. Layers that do not
hand keywords on find it as those of towers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.graphs import hold
from triton_sp.wrappers.install import Override, replaced

if TYPE_CHECKING:
    from triton_sp.wrappers.proof.verification import Proof
    from triton_sp.wrappers.towers.placement import Placement

KEYWORD = "triton_sp_scope"  # the keyword, or in towers the attribute, by which attention finds its scope


@dataclass(frozen=True, eq=False)
class Call:
    """The scope of one forward of the wrapped model, in which its parts are sharded. Without it they run unsharded, or
    raise: see refuse_lost_scope.

    Attributes:
        placement: while a method makes features: where the tokens of the tower that it calls are outside of its blocks.
            None everywhere else: all ranks have all tokens there.
        attention: while a decoder runs whose layers do not hand keywords on: the scope of its attention.
    """

    placement: Placement | None = field(default=None, kw_only=True)
    attention: AttentionScope | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class AttentionScope:
    """What an attention function needs: the stream, and the tally that proves every layer came by.

    Attributes:
        by_layer_type: the streams of layers of a type that attend in other segments (chunks).
        attention: the modules that find this scope by their attribute, while it is the active one: a tower's, and
            those of a decoder whose layers do not hand keywords on.
        decoder: whether it is the scope of a decoder.
        index: (T,) where this rank's tokens stand in their rows, for attention that numbers them itself.
        handle, local: of `traceable`: the number of this scope, and by the type of layer whether there is no exchange.
        methods: how the recurrent layers have run, see plan/recurrence.py.
        proof: verifies a layer in this call, or None.
        forward: the number of the model's forward; a recomputation has that which it computes again.
        causal: where a model makes its masks itself, whether they are; where its modules know it, None.
    """

    stream: Stream
    tally: Counter[str] = field(default_factory=Counter)
    methods: set[str] = field(default_factory=set)
    causal: bool | None = None
    by_layer_type: Mapping[str | None, Stream] = field(default_factory=dict)
    attention: Sequence[nn.Module] = ()
    decoder: bool = False
    index: Tensor | None = None
    proof: Proof | None = None
    forward: int = 0
    handle: Tensor | None = None
    local: Mapping[str | None, bool] = field(default_factory=dict)

    def stream_of(self, layer_type: str | None) -> Stream:
        """The stream of layers of a type."""
        return self.by_layer_type.get(layer_type, self.stream)

    def traceable(self) -> AttentionScope:
        """This scope as graphs of torch.compile take it."""
        streams = {None: self.stream, **self.by_layer_type}
        return replace(self, handle=hold(self), local={kind: stream.is_local for kind, stream in streams.items()})


_active: ContextVar[object] = ContextVar("triton_sp_scope", default=None)
_PLAIN = object()
_T = TypeVar("_T")


def current(kind: type[_T]) -> _T | None:
    """The scope that is active, if it is of this kind."""
    scope = _active.get()
    return scope if isinstance(scope, kind) else None


@contextmanager
def active(scope: object) -> Iterator[None]:
    """Make a scope the active one. With None there is none, on purpose: parts run on all tokens, as if not wrapped."""
    token = _active.set(_PLAIN if scope is None else scope)
    try:
        with ExitStack() as stack:
            found = scope.attention if isinstance(scope, Call) else scope
            for module in found.attention if isinstance(found, AttentionScope) else ():
                stack.enter_context(replaced(module, KEYWORD, found))
            yield
    finally:
        _active.reset(token)


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs in the scope that is active now, and names the same module: some checkpoints ask for it."""
    if isinstance(function, partial):
        return partial(_bound(function.func), *function.args, **function.keywords)
    scope = _active.get()

    @wraps(function, assigned=("__self__",), updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with active(scope):
            return function(*args, **kwargs)

    return run


def _checkpoint_in_scope(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(_bound(function), *args, **kwargs)


@contextmanager
def bound_checkpoints(model: nn.Module) -> Iterator[None]:
    """While a model runs, what it checkpoints is bound to the scope that is active at that moment."""
    name = "_gradient_checkpointing_func"
    with ExitStack() as stack:
        for module in [module for module in model.modules() if name in module.__dict__]:
            bound = partial(_checkpoint_in_scope, module.__dict__[name])
            stack.enter_context(replaced(module, name, bound))
        yield


def check_tally(tally: Counter[str], calls: int, stack: str, kind: str = "attention") -> None:
    """Raise unless every layer of a kind in a stack has come by: none may have run on a shard unnoticed."""
    if tally[kind] != calls:
        raise UnsupportedModelError(
            stack,
            expected=f"{calls} sharded calls of {kind} layers",
            found=f"{tally[kind]}",
            remedy=f"report this model: some of its {kind} layers were not called through the wrapper",
        )


def recomputing() -> bool:
    """Whether this runs inside a backward: the recomputation of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def refuse_lost_scope(override: Override) -> None:
    """To be called where a part runs without a scope. A direct call of it is fine, but not in a step of training, where
    it would run unsharded and nobody would know; nor in a recomputation.

    Raises:
        UnsupportedModelError: one of the two.
    """
    name = type(override.module).__name__
    if recomputing():
        raise UnsupportedModelError(
            name,
            expected="activation checkpointing through model.gradient_checkpointing_enable()",
            found="a checkpoint around it that re-runs it in the backward on its own",
            remedy="use gradient_checkpointing_enable(), or checkpoint the whole model",
        )
    trains = override.module.training and torch.is_grad_enabled()
    if _active.get() is None and trains and override.installation.group.size > 1:
        entry = override.installation.anatomy.entry
        covered = not isinstance(entry.__dict__.get("forward"), Override)
        found = "a direct call of it in training, which would not be sharded"
        remedy = f"call the wrapped {type(entry).__name__}; under torch.no_grad() or in eval mode its parts run plain"
        if covered:
            found += f": {_origin(entry.forward)} stands in front of the forward that wrap installed"
            remedy = "call triton_sp.share_batches(trainer, group), or wrap again, after the trainer has been made"
        raise UnsupportedModelError(
            f"{name}.{override.method}",
            expected=f"to be reached through the wrapped {type(entry).__name__}",
            found=found,
            remedy=remedy,
        )


def _origin(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
