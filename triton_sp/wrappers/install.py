"""How a wrapper gets into a model: `forward` of single instances is replaced, and every edit can be undone.

No class is patched and no module is put around another, so parameter names, state_dict keys, isinstance, deepcopy and
pickle stay as they are. An override holds its module and plain data only, never a process group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from triton_sp.anatomy.parts import Anatomy
from triton_sp.config import SPConfig
from triton_sp.errors import SPError
from triton_sp.ops.backends import choice
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.shards import Shards
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.graphs import between_graphs, compiled_again
from triton_sp.wrappers.inputs.state import ModelState

if TYPE_CHECKING:
    from triton_sp.wrappers.proof.verification import Proof

_MISSING = "<not set on the instance>"
_MARK = "_triton_sp"


@dataclass(frozen=True)
class LastCall:
    """What a stack did with the batch before: the plan, and how its kinds of layers attended on this rank."""

    choice: PlanChoice
    attended: tuple[str, ...]


class Layouts(dict[Any, Any]):
    """The layouts of the last batches, see wrappers/inputs/kept.py. Copies and pickles of a model begin without."""

    def __reduce_ex__(self, _: Any) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()


@dataclass(eq=False)
class Installation:
    """One wrapped model: its group, settings and parts, and what was changed to wrap it."""

    group: Group
    config: SPConfig
    anatomy: Anatomy
    edits: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    agreed: set[int] = field(default_factory=set)  # digests of the kinds of batches that ranks have agreed on
    tried: set[tuple[Any, ...]] = field(default_factory=set)  # kinds that were compared with the unsharded model
    last_calls: dict[str, LastCall] = field(default_factory=dict)  # by the name of the stack
    last_rows: dict[str, Shards] = field(default_factory=dict)  # features each rank got, by the method that makes them
    last_whole: dict[str, str] = field(default_factory=dict)  # why a method made them all on every rank, if it did
    layouts: Layouts = field(default_factory=Layouts)
    front: Override | None = None  # that of the model's own forward
    offloaded: int = 0  # bytes that went to the CPU in the last call
    head_verified: bool = False  # what the model does to logits was seen once, see wrappers/losses/head.py
    routers_verified: bool = False  # so was how it balances its experts, see wrappers/losses/routers.py
    forwards: int = 0  # that have begun, those of recomputations not counted
    proof: Proof | None = None  # of the last forward
    verified: str = ""  # the last result
    state: ModelState = field(init=False)  # what the models of all ranks must have in common

    def __post_init__(self) -> None:
        """Raise an InputError where the chosen attention is not installed, before anything is changed."""
        choice.require(self.config.attention)
        self.state = ModelState(self.anatomy.entry)

    @property
    def idle(self) -> bool:
        """Whether the model stays as it is: on one rank, unless more is asked for."""
        config = self.config
        wanted = config.single or config.chunked_loss or config.label_smoothing or config.tiled_mlp or config.offload
        return self.group.size == 1 and not wanted

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one instance, and remember how to take it back."""
        self.edits.append((module, name, module.__dict__.get(name, _MISSING)))
        setattr(module, name, value)

    def override(
        self, module: nn.Module, run: Callable[..., Any], method: str = "forward", *, traced: bool = False
    ) -> None:
        """Let `run(override, *args, **kwargs)` stand for `module.forward`, or for another method.

        Args:
            traced: under torch.compile it is part of the graph, and else runs between graphs.
        """
        override = (TracedOverride if traced else Override)(module, run, self, method)
        # A method, because a graph that has come by another object is this module's alone, and torch makes 8 at most.
        self.set(module, method, override.__call__ if traced else override)
        if module is self.anatomy.entry and method == "forward":
            self.front = override

    def return_to_front(self) -> None:
        """Put the model's forward in front of one that a trainer has put over it since; do nothing if it is there.

        Ours stays behind theirs as well, where it passes calls on.
        """
        entry, covering = self.anatomy.entry, self.anatomy.entry.__dict__.get("forward")
        if self.idle or isinstance(covering, Override):
            return
        assert self.front is not None
        index = max(i for i, (module, name, _) in enumerate(self.edits) if module is entry and name == "forward")
        self.edits[index] = (entry, "forward", covering)  # what undo will leave
        front = Override(entry, self.front.run, self, "forward")
        self.front.run = Override.original
        self.front = entry.forward = front

    def undo(self) -> None:
        """Take every edit back, the last one first."""
        for module, name, old in reversed(self.edits):
            now = module.__dict__.get(name)
            if name == "forward" and not isinstance(getattr(now, "__self__", now), Override):
                raise SPError(
                    f"{type(module).__name__}.forward",
                    expected="the forward that wrap installed",
                    found="one that something else put over it since",
                    remedy="take that one off first, e.g. by accelerator.unwrap_model",
                )
            _put_back(module, name, old)
        self.edits.clear()
        self.layouts.clear()


@functools.cache
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """Of a method, without `self`. Each block of a tower asks for its own three times in a call, and Python takes 11 us
    a time (measured on a CPU)."""
    return inspect.Signature(list(inspect.signature(method).parameters.values())[1:])


class Override:
    """The `forward`, or another method, of one module instance. A plain object, so that it copies and pickles with its
    module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], installation: Installation, method: str) -> None:
        self.module, self.run, self.installation, self.method = module, run, installation, method
        self.shadowed = module.__dict__.get(method)

    @torch.compiler.disable(recursive=False, reason="it talks to other ranks, or reads values of tensors")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return between_graphs(self.run, self, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that was there before."""
        # No frame of ours is compiled on the way: it would be compiled anew for each module, up to torch's limit.
        return compiled_again(
            self.shadowed or MethodType(getattr(type(self.module), self.method), self.module), *args, **kwargs
        )

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the module's own method. Trainers read it to see which fields of a batch it takes."""
        return _signature(getattr(type(self.module), self.method))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return dict(arguments)


class TracedOverride(Override):
    """One that becomes part of a graph: it does not look at values of tensors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that was there before."""
        if self.shadowed is not None:
            return self.shadowed(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of one instance another value while a call runs."""
    old = module.__dict__.get(name, _MISSING)
    setattr(module, name, value)
    try:
        yield
    finally:
        _put_back(module, name, old)


def _put_back(module: nn.Module, name: str, old: Any) -> None:
    if old is _MISSING:
        delattr(module, name)
    else:
        setattr(module, name, old)


def attach(model: nn.Module, installation: Installation) -> None:
    """Mark a model as wrapped, so that `installation_of` finds it."""
    installation.set(model, _MARK, installation)


def installation_of(model: nn.Module) -> Installation | None:
    """The installation that a model, or a model inside it (PEFT, DDP), is wrapped with."""
    return next((m.__dict__[_MARK] for m in model.modules() if _MARK in m.__dict__), None)
