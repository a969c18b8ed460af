"""How a wrapper gets into a model: `forward` of single instances is replaced, and every edit can be undone.

No class is patched and no module is put around another, so parameter names, state_dict keys, isinstance, deepcopy and
pickle stay as they are. An override holds its module and plain data only, never a process group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from triton_sp.anatomy import Anatomy
from triton_sp.cost import Choice
from triton_sp.errors import SPError
from triton_sp.groups import Group
from triton_sp.plan import Shards

_MISSING = "<not set on the instance>"
_MARK = "_triton_sp"


@dataclass(frozen=True)
class SPConfig:
    """How a model is wrapped.

    Attributes:
        gradient: what will combine the ranks' gradients. "mean" for engines that average over ranks (DDP, FSDP, ZeRO
            and `sync_gradients`), "sum" for those that add. "auto" is "mean", but with DeepSpeed's own mpu the choice
            is yours, see mpu.py.
        gather_logits: whether `out.logits` (without a head: `out.last_hidden_state`) holds all tokens, (B, S, V) with
            0 at padding, instead of this rank's, (1, T, V).
        chunked_loss: whether a training step with labels leaves `out.logits` None and forms its loss from a chunk of
            logits at a time: (tokens, vocabulary) never exists. Liger-Kernel's kernel does it where it is installed
            and the head is a plain linear layer on a GPU; `explain` says.
        label_smoothing: of the loss, as transformers' LabelSmoother has it. (That one needs all logits on every rank:
            `gather_logits`.)
        check: "always" compares the ranks' inputs before each forward, so that a difference raises on all of them.
            "first" does so for the first batch of each kind (shapes, settings, plan), and only compares the kind of
            later ones: other ids, labels or pixels of the same shape go unnoticed. "off" trusts the caller.
        plan: "auto" takes what the cost model finds fastest for each stream, see cost.py. "heads", "segments" and, for
            vision towers, "replicate" ask for one; where it is not possible "auto" decides.
        chunks: in how many parts heads are exchanged, if they divide: one travels while another is attended to, and
            buffers are the smaller. Worth it where the exchange is long; short ones only multiply.
        link: what the cost model reckons with: "nvlink", "pcie", "gloo", or "auto" for what `triton-sp calibrate` has
            measured on this machine, else "gloo" on CPUs and "nvlink" on GPUs.

    >>> SPConfig(gradient="sum").gather_logits
    False
    """

    gradient: Literal["auto", "mean", "sum"] = "auto"
    gather_logits: bool = False
    chunked_loss: bool = False
    label_smoothing: float = 0.0
    check: Literal["always", "first", "off"] = "always"
    plan: Literal["auto", "heads", "segments", "replicate"] = "auto"
    link: Literal["auto", "nvlink", "pcie", "gloo"] = "auto"
    chunks: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("gradient", ("auto", "mean", "sum")),
            ("check", ("always", "first", "off")),
            ("plan", ("auto", "heads", "segments", "replicate")),
            ("link", ("auto", "nvlink", "pcie", "gloo")),
        ):
            if getattr(self, name) not in allowed:
                raise SPError(
                    f"SPConfig.{name}",
                    expected=f"one of {allowed}",
                    found=repr(getattr(self, name)),
                    remedy="correct the argument",
                )
        if not 0 <= self.label_smoothing <= 1:
            raise SPError(
                "SPConfig.label_smoothing",
                expected="0 to 1",
                found=repr(self.label_smoothing),
                remedy="correct the argument",
            )
        if not isinstance(self.chunks, int) or self.chunks < 1:
            raise SPError(
                "SPConfig.chunks", expected="1 or more", found=repr(self.chunks), remedy="correct the argument"
            )


@dataclass(frozen=True)
class LastCall:
    """What a stack did with the batch before: the plan, and how its kinds of layers attended on this rank."""

    choice: Choice
    attended: tuple[str, ...]


@dataclass(eq=False)
class Installation:
    """One wrapped model: its group, settings and parts, and what was changed to wrap it."""

    group: Group
    config: SPConfig
    anatomy: Anatomy
    edits: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    agreed: set[int] = field(default_factory=set)  # digests of the kinds of batches that ranks have agreed on
    last_calls: dict[str, LastCall] = field(default_factory=dict)  # by the name of the stack
    last_rows: dict[str, Shards] = field(default_factory=dict)  # features each rank got, by the method that makes them
    checked_head: bool = False  # what the model does to logits was seen once, see wrappers/head.py

    @property
    def idle(self) -> bool:
        """Whether the model is right as it is: on one rank, unless it is asked for another loss."""
        return self.group.size == 1 and not (self.config.chunked_loss or self.config.label_smoothing)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one instance, and remember how to take it back."""
        self.edits.append((module, name, module.__dict__.get(name, _MISSING)))
        setattr(module, name, value)

    def override(self, module: nn.Module, run: Callable[..., Any], method: str = "forward") -> None:
        """Let `run(override, *args, **kwargs)` stand for `module.forward`, or for another method."""
        self.set(module, method, Override(module, run, self, method))

    def undo(self) -> None:
        for module, name, old in reversed(self.edits):
            now = module.__dict__.get(name)
            if name == "forward" and not isinstance(now, Override):
                raise SPError(
                    f"{type(module).__name__}.forward",
                    expected="the forward that wrap installed",
                    found="one that something else put over it since",
                    remedy="take that one off first, e.g. by accelerator.unwrap_model",
                )
            if old is _MISSING:
                delattr(module, name)
            else:
                setattr(module, name, old)
        self.edits.clear()


class Override:
    """The `forward`, or another method, of one module instance. A plain object, so that it copies and pickles with its
    module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], installation: Installation, method: str) -> None:
        self.module, self.run, self.installation, self.method = module, run, installation, method
        self.below = module.__dict__.get(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that was there before."""
        if self.below is not None:
            return self.below(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own method: trainers read a model's to see which columns of a batch it takes."""
        parameters = list(inspect.signature(getattr(type(self.module), self.method)).parameters.values())
        return inspect.Signature(parameters[1:])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return dict(arguments)


def mark(model: nn.Module, installation: Installation) -> None:
    installation.set(model, _MARK, installation)


def installation_of(model: nn.Module) -> Installation | None:
    """The installation that a model, or a model inside it (PEFT, DDP), is wrapped with."""
    return next((m.__dict__[_MARK] for m in model.modules() if _MARK in m.__dict__), None)
