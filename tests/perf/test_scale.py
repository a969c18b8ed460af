"""The formulas of perf/scale.py against bytes counted in real runs."""

from __future__ import annotations

import pytest
import scale_jobs

from perf import scale
from perf.scale import Attention


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (4, 1)])
def test_one_level(ranks, heads: int, kv_heads: int, size: int) -> None:
    layer = Attention("test", 24, heads, kv_heads, 16, True, itemsize=4)
    expected = scale.one_level(layer, size, node=2)
    for forward, backward, collectives in ranks.run(scale_jobs.one_level, layer, ranks=size):
        assert forward == expected.inside + expected.between
        assert backward == forward  # shards are equal here, and the adjoint sends what was received
        assert collectives == expected.collectives


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (4, 1)])
def test_two_levels(ranks, heads: int, kv_heads: int) -> None:
    layer = Attention("test", 24, heads, kv_heads, 16, True, itemsize=4)
    expected = scale.two_level(layer, 4, node=2)
    for inside, between in ranks.run(scale_jobs.two_level, layer, 2, ranks=4):
        assert (inside, between) == (expected.inside, expected.between)


def test_fractions_send_no_more_keys_than_needed(ranks) -> None:
    """25 heads on 4 ranks: what all ranks send is every query and output that is not at home, and keys and values of
    25 heads and at most one more for each cut through a head."""
    tokens, heads, dim = 64, 25, 8
    layer = Attention("test", tokens, heads, heads, dim, False, itemsize=4)
    sent = sum(forward for forward, _, _ in ranks.run(scale_jobs.one_level, layer, ranks=4))
    away = tokens * dim * 4 * 3 / 4
    assert away * 4 * heads < sent <= away * (2 * heads + 2 * (heads + 3)) * 1.001
