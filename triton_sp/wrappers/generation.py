"""`generate` of a wrapped model: its calls of the model's forward are told from those of training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton_sp.wrappers.install import Installation, Override

_generating: ContextVar[bool] = ContextVar("triton_sp_generating", default=False)


def install(installation: Installation) -> None:
    """Override the `generate` of a model that has one."""
    if hasattr(installation.anatomy.entry, "generate"):
        installation.override(installation.anatomy.entry, _run_generate, "generate")


def generating() -> bool:
    """Whether this runs inside a `generate`, whatever cache it uses, or none."""
    return _generating.get()


@contextmanager
def _in_generation() -> Iterator[None]:
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)


def _run_generate(override: Override, *args: Any, **kwargs: Any) -> Any:
    with _in_generation():
        return override.original(*args, **kwargs)
