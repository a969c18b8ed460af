"""Small steps of all kinds, many in one run; `make soak` has 10,000."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize("steps", [100, pytest.param(500, marks=pytest.mark.long)])
def test_fuzz(ranks, steps: int) -> None:
    for result in ranks.run(fuzz.run, steps, 120, ranks=2):
        assert result.loss < 1e-4 and result.gradient < 1e-4, result
        assert result.grown < 50, result
