"""Norms and rotary embeddings of q and k, done where they are packed instead of by the model's own operators.

A module rotates q and k by a global function of (q, k, cos, sin). Its own forward runs with another function behind
that name: one that hands q and k on as they are, and leaves cos and sin to the pack. Modules that have normalised the
heads of q and k before return what they are given. Whether the pack computes the same is tried on the first call, in
which the model's own code still does both: see rotation_trial.py and norm_trial.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import Anatomy
from triton_sp.errors import UnsupportedModelError
from triton_sp.ops.pack import Rotation
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.layers.norm_trial import HeadNorms, Made, is_rows, may_be_norm, try_norms
from triton_sp.wrappers.layers.rotation_trial import LAYOUTS, Rotated, fit, is_view, tables, try_rotation, version
from triton_sp.wrappers.lookups import with_globals

ROTATOR = "_triton_sp_rotator"  # the attribute of an attention module
FOLDED = "the launch that packs q, k and v"
NORMALISED = f"{FOLDED}, which normalises q and k too,"
_GIVEN = ["q", "k", "cos", "sin"]
_CACHES = ("cache", "past_key_values", "past_key_value")  # which hold rotated keys


@dataclass(eq=False)
class Rotator:
    """What is known of how one attention module rotates.

    Attributes:
        since: the forward in which it was tried; None before. A recomputation of that one does as it did.
        why: why its own code rotates; empty where the pack does.
        layout: which of LAYOUTS it has.
        norms: what the pack normalises heads of q and k by before; None if nothing does, or the module's own code, and
            `why_own` that.
    """

    since: int | None = None
    why: str = "not tried, as no eager forward has run"
    layout: int = 0
    norms: HeadNorms | None = None
    why_own: str = ""

    def __str__(self) -> str:
        """What rotates, and what normalises."""
        if self.why:
            return f"the model's own code ({self.why})"
        own = f" (norms by the model's own code: {self.why_own})" if self.why_own else ""
        return NORMALISED if self.norms else FOLDED + own


@dataclass(eq=False)
class _Run:
    """One run of an attention module.

    Attributes:
        folds: whether the pack is to rotate; else the module is tried.
        calls: of its function that rotates, where it is tried.
        made: by its children that may be norms, likewise.
        left: q, k, cos and sin that are left to the pack.
        norms: modules that are to be left to the pack, and `rows` what they were given.
    """

    module: nn.Module
    rotator: Rotator
    folds: bool
    forward: int
    calls: list[Rotated] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    left: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    norms: tuple[Any, ...] = ()
    rows: list[tuple[nn.Module, Tensor]] = field(default_factory=list)

    def takes(self, q: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether the pack can rotate by these tables."""
        layout = LAYOUTS[self.rotator.layout]
        return self.left is None and q.ndim == layout.dims and fit(q.shape[layout.tokens], q.shape[-1], cos, sin)

    def try_both(self, states: tuple[Tensor, Tensor, Tensor]) -> None:
        """The trial, by the q, k and v (1, H, T, D) that attention is given."""
        rotator = self.rotator
        rotator.since = self.forward
        rotator.layout, rotator.why = try_rotation(self.calls, *states[:2])
        if not rotator.why:
            given, dim = self.calls[0].given[:2], states[2].shape[-1]
            rotator.norms, rotator.why_own = try_norms(self.module, self.made, given, dim)

    def rotation(self, query: Tensor, key: Tensor) -> Rotation | None:
        """What is left to the pack; None if attention is not given what that is for."""
        if self.left is None:
            return None
        q, k, cos, sin = self.left
        lay, rotation = LAYOUTS[self.rotator.layout].lay, tables(cos, sin)
        arrived = is_view(query, lay(q)) and is_view(key, lay(k))
        if self.norms and self.rotator.norms:
            rotation = rotation._replace(norm=self.rotator.norms.of_weights(self.norms))
            expected = zip(self.norms, (q, k), strict=True)
            rows = [any(m is norm and is_rows(x, of) for m, x in self.rows) for norm, of in expected]
            arrived = arrived and all(rows) and len(self.rows) == len(rows)
        return rotation if arrived else None


_current: ContextVar[_Run | None] = ContextVar("triton_sp_rotation", default=None)


def prepare(module: nn.Module, installation: Installation) -> None:
    """Let a module be tried on its first call, if it is known where it rotates."""
    functions, rotator = _functions(type(module)), Rotator()
    if not functions and "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        return
    if installation.config.trial == "off":
        rotator = Rotator(0, 'SPConfig(trial="off")')
    elif len(functions) != 1 or _forward_of(type(module))[1] is None:
        rotator = Rotator(0, "no one function of q, k, cos and sin")
    installation.set(module, ROTATOR, rotator)
    for child in module.children() if rotator.since is None else ():
        if may_be_norm(child):
            installation.override(child, _run_norm, traced=True)


def run_module(override: Override, forward: int, /, *args: Any, **kwargs: Any) -> Any:
    """An attention module's own forward, in the model's forward of this number; the pack rotates q and k, if that was
    found to be the same."""
    rotator: Rotator | None = getattr(override.module, ROTATOR, None)
    if rotator is None or (rotator.why and rotator.since is not None) or override.shadowed is not None:
        return override.original(*args, **kwargs)
    own, ours = _forward_of(type(override.module))
    if own is not type(override.module).forward or any(kwargs.get(name) is not None for name in _CACHES):
        return override.original(*args, **kwargs)
    run = _Run(override.module, rotator, rotator.since is not None and forward > rotator.since, forward)
    if run.folds and rotator.norms is not None:
        run.norms = rotator.norms.of(override.module)
    token = _current.set(run)
    try:
        return ours(override.module, *args, **kwargs)
    finally:
        _current.reset(token)


def _run_norm(override: Override, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of what may be a norm of q or k."""
    run = None if torch.compiler.is_compiling() else _current.get()
    if run is None or kwargs or len(args) != 1:
        return override.original(*args, **kwargs)
    if any(override.module is norm for norm in run.norms):
        run.rows.append((override.module, args[0]))
        return args[0]
    made = override.original(*args)
    if run.rotator.since is None and isinstance(made, Tensor):
        run.made.append(Made(override.module, args[0], made, version(made)))
    return made


def rotation_of(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Rotation | None:
    """What attention is to rotate q and k by, which are (1, H, T, D); None where the module has done it.

    Raises:
        UnsupportedModelError: q and k are not those that the module has left to be rotated, or to be normalised.
    """
    run = _current.get()
    if run is None or run.module is not module:
        return None
    if run.left is None and not run.rows:
        if not run.folds and run.rotator.since is None:
            run.try_both((query, key, value))
        return None
    if (rotation := run.rotation(query, key)) is None:
        raise UnsupportedModelError(
            type(module).__name__,
            expected="attention of the q and k that its norms and its rotation have returned, as in its first call",
            found="others",
            remedy='let its own code do both: SPConfig(trial="off"), and report the model',
        )
    return rotation


def describe_rotations(anatomy: Anatomy) -> str:
    """What rotates q and k in the attention modules of a model, for `explain`."""
    found = [getattr(module, ROTATOR, None) for stack in anatomy.stacks for module in stack.attention]
    told = [str(rotator) for rotator in found if rotator]
    return ", ".join(f"{how} in {told.count(how)} layers" for how in dict.fromkeys(told))


# --- the forward with another function behind a name ---------------------------------------------------------------


@functools.cache
def _functions(kind: type) -> dict[str, Callable[..., Any]]:
    """The functions of (q, k, cos, sin, ...) that a class's forward calls by global names."""
    forward: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code = getattr(forward, "__code__", None)
    named = {name: forward.__globals__.get(name) for name in code.co_names} if code else {}
    return {
        name: function
        for name, function in named.items()
        if inspect.isfunction(function) and list(inspect.signature(function).parameters)[:4] == _GIVEN
    }


@functools.cache
def _forward_of(kind: type) -> tuple[Any, Any]:
    """A class's forward, which others may replace later, and the same but that it looks up ours where it looks up the
    function that rotates; None if what decorates it cannot be put around another function."""
    own: Any = kind.forward  # type: ignore[attr-defined]
    names = {name: _left_to_the_pack(function) for name, function in _functions(kind).items()}
    return own, _with_ours(own, names)


def _with_ours(function: Any, names: dict[str, Any]) -> Any:
    """`with_globals` of a function that may be decorated."""
    if not inspect.isfunction(function):
        return None
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__ or ()
    if inner is not None:
        ours = _with_ours(inner, names)
        around = [cell.cell_contents is inner for cell in cells]
        if ours is None or not any(around):
            return None
        cells, names = tuple(CellType(ours) if it_is else cell for cell, it_is in zip(cells, around, strict=True)), {}
    return with_globals(function, names, cells)


def _left_to_the_pack(function: Callable[..., Any]) -> Callable[..., Any]:
    """What stands behind the name of a function that rotates."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        if run is not None and run.folds and run.takes(q, cos, sin):
            run.left = q, k, cos, sin
            return q, k
        made = function(q, k, cos, sin, *args, **kwargs)
        if run is not None and run.rotator.since is None:
            run.calls.append(Rotated(function, (q, k, cos, sin, *args), kwargs, made, [version(x) for x in made]))
        return made

    return rotate
