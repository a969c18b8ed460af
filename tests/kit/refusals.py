"""What every rank raised, held to what our errors promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from triton_sp import errors
from triton_sp.testing import RankError, RankPool

SECONDS = 60.0  # a rank that waits for another would wait for half an hour; the rest is room for a busy machine


def ready() -> None:
    """Started, and everything imported."""


def errors_of(ranks: RankPool, job: Callable[..., Any], *args: Any, size: int = 2) -> list[errors.SPError]:
    """What each rank raised, in rank order: every one of them has to."""
    with pytest.raises(RankError) as caught:
        ranks.run(job, *args, ranks=size, timeout=SECONDS)
    raised = [caught.value.errors[rank] for rank in range(size)]
    for error in raised:
        assert isinstance(error, errors.SPError), error
        assert error.field and error.expected and error.found and error.remedy
        assert f"{error.field}: expected {error.expected}, found {error.found}. Remedy: {error.remedy}." in str(error)
    return raised
