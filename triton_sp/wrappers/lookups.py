"""A function as it is, but that it finds other things behind some of the global names that it looks up."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any


def with_globals(function: Any, names: Mapping[str, Any], cells: tuple[CellType, ...] | None = None) -> FunctionType:
    """A copy of a function with other globals; the function itself is not touched.

    Args:
        names: what the copy finds behind these names. All others are as they are now.
        cells: the variables around it, if not its own.

    >>> def twice(x):
    ...     return abs(x) * 2
    >>> with_globals(twice, {"abs": lambda x: x})(-3), twice(-3)
    (-6, 6)
    """
    closure = function.__closure__ if cells is None else cells
    looked_up = {**function.__globals__, **names}
    copied = FunctionType(function.__code__, looked_up, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
