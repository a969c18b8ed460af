"""What can go wrong on one rank: the right result, or an error on every rank that names it; all in faults.py."""

from __future__ import annotations

import faults
import pytest

SLOW = ("slow", "killed", "stopped", "beside", "lives on", "apart", "meanwhile", "waiting")
QUICK = [name for name in faults.FAULTS if not any(word in name for word in SLOW)]


@pytest.mark.parametrize("name", QUICK)
def test_on_two_ranks(ranks, name: str) -> None:
    row = faults.outcome(ranks, name, 2)
    assert row["fine"], row
    assert row["seconds"] < 30, row  # 5 on a machine that does nothing else, as `make faults` shows


def test_fewer_tokens_than_ranks(ranks) -> None:
    assert faults.outcome(ranks, "fewer tokens than ranks", 4)["fine"]
