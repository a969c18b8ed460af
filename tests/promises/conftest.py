"""What tests of promises share."""

from __future__ import annotations

import pytest
from kit.refusals import ready

from triton_sp.testing import RankPool


@pytest.fixture(scope="module")
def started(ranks: RankPool) -> None:
    """On a busy machine this takes longer than a rank may take for an answer, see kit/refusals.py."""
    ranks.run(ready, ranks=3, timeout=1000)
