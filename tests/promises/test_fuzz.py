"""Small steps of all kinds, many in one run; `make soak` has 10,000."""

from __future__ import annotations

import fuzz


def test_fuzz(ranks) -> None:
    for result in ranks.run(fuzz.run, 60, 1000, ranks=2):
        assert result.loss < 1e-4 and result.gradient < 1e-4, result
        assert result.grown < 50, result
