"""As much of pytest as the kernels' test files need, for a GPU machine that may not have it.

`perf.testrun` puts this module in pytest's place, whether pytest is installed or not, so that the tests run there as
they were tried out here. Missing are plugins, fixtures of scopes and assertions that are rewritten.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple
from unittest import mock


class Skipped(Exception):
    """Raised by `skip`."""


class Mark:
    """A mark as a decorator, such as `mark.skipif(condition, reason="...")`."""

    def __init__(self, name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], FunctionType) and not kwargs:
            args[0].__dict__.setdefault("pytestmark", []).append(self)
            return args[0]
        return Mark(self.name, args, kwargs)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


mark = _Marks()


class Param(NamedTuple):
    """One row of a parametrization."""

    values: tuple[Any, ...]
    id: str | None
    marks: tuple[Mark, ...]


def param(*values: Any, id: str | None = None, marks: Any = ()) -> Param:
    """A row with a name or marks of its own."""
    return Param(values, id, (marks,) if isinstance(marks, Mark) else tuple(marks))


def skip(reason: str = "") -> None:
    """End the test that runs, which has not failed."""
    raise Skipped(reason)


def importorskip(name: str) -> Any:
    """The module of that name, or the end of the test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(str(error)) from error


class Raised:
    """What `raises` caught."""

    value: BaseException


@contextmanager
def raises(kind: type[BaseException] | tuple[type[BaseException], ...], match: str = "") -> Iterator[Raised]:
    """The block must raise an exception of this kind, and its message hold the pattern."""
    found = Raised()
    try:
        yield found
    except kind as error:
        assert re.search(match, str(error)), f"{error!r} does not match {match!r}"
        found.value = error
    else:
        raise AssertionError(f"nothing was raised, expected {kind}")


def fixture(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Marks a function as a fixture, `autouse` or by name."""
    if function is None:
        return lambda inner: fixture(inner, **options)
    function.fixture = options
    return function


class MonkeyPatch:
    """Changes that are undone after a test."""

    def __init__(self, test: ExitStack) -> None:
        # One of its own, so that fixtures made with it end before what it has changed is undone.
        self.stack = test.enter_context(ExitStack())

    def setattr(self, target: Any, name: Any, value: Any = None) -> None:
        """Replace an attribute, given by object and name or by its whole path."""
        patch = mock.patch(target, name) if isinstance(target, str) else mock.patch.object(target, name, value)
        self.stack.enter_context(patch)

    def setenv(self, name: str, value: str) -> None:
        """Set an environment variable."""
        self.stack.enter_context(mock.patch.dict(os.environ, {name: value}))

    def delenv(self, name: str, raising: bool = True) -> None:
        """Remove an environment variable."""
        self.stack.enter_context(mock.patch.dict(os.environ))
        if raising or name in os.environ:
            del os.environ[name]
