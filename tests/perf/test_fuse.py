"""What perf/fuse.py counts is what a run sends and holds."""

from __future__ import annotations

import pytest

from perf import fuse


@pytest.mark.parametrize(("way", "size"), [("routed", 3), ("gathered", 2)])
def test_counts_are_those_of_a_run(ranks, way: str, size: int) -> None:
    for rank, row in enumerate(ranks.run(fuse.run, way, ranks=size)):
        assert row.pop("output_error") < 1e-6 and row.pop("gradient_error") < 1e-6
        assert row == fuse.count(way, size, rank)
