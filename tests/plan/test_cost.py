"""Laws of cutting at segments, and of the choice between plans."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import segments_of

from triton_sp.errors import InputError
from triton_sp.plan.cost import LINKS, Layers, choose_plan, find_link, store_link
from triton_sp.plan.segments import Segments, shard_segments

TOWER = Layers(count=27, width=1152, q=1152, kv=1152, head_dim=72, itemsize=2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=9), st.integers(1, 4))
def test_cuts_at_segments_are_the_best_there_are(pairs: list[tuple[int, int]], ranks: int) -> None:
    lengths, costs = [length for length, _ in pairs], [cost for _, cost in pairs]
    segments = segments_of(lengths)
    shards = shard_segments(segments, ranks, costs)
    if len(pairs) < ranks:
        assert shards is None
        return
    assert shards is not None and shards.total == sum(lengths) and min(shards.sizes) > 0
    assert segments.local(shards)

    def busiest(cuts: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))

    best = min(busiest(cuts) for cuts in itertools.combinations(range(1, len(costs)), ranks - 1))
    assert busiest(tuple(segments.starts.index(start) for start in shards.starts[1:])) == best


def test_cuts_keep_units_whole() -> None:
    shards = shard_segments(Segments((0, 2, 4, 6, 8, 12, 16)), 2, [1] * 6, unit=4)
    assert shards is not None and all(start % 4 == 0 for start in shards.starts)
    assert shard_segments(Segments((0, 2, 4)), 2, [1, 1], unit=4) is None


@pytest.mark.parametrize(
    ("lengths", "link", "plan"),
    [
        ([576] * 384, "nvlink", "segments"),  # frames of a video
        ([16384], "nvlink", "heads"),  # one large picture
        ([64] * 256, "nvlink", "segments"),  # windows
        ([40000, 1000, 1000, 1000, 1000, 1000, 1000, 1000], "nvlink", "heads"),  # one image dominates
        ([256], "nvlink", "replicate"),
        ([16384], "pcie", "heads"),
    ],
)
def test_choice(lengths: list[int], link: str, plan: str) -> None:
    choice = choose_plan(segments_of(lengths), 8, 4, TOWER, LINKS[link], "auto", True)
    assert choice.plan == plan, choice
    assert choice.shards.total == sum(lengths)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60).map(lambda n: 4 * n), min_size=1, max_size=20),
    st.integers(2, 8),
    st.sampled_from(["auto", "heads", "segments", "replicate"]),
    st.booleans(),
)
def test_every_choice_can_run(lengths: list[int], ranks: int, forced: str, replicable: bool) -> None:
    segments = segments_of(lengths)
    choice = choose_plan(segments, ranks, 4, TOWER, LINKS["gloo"], forced, replicable)
    assert choice.shards.total == sum(lengths) and all(size % 4 == 0 for size in choice.shards.sizes)
    if replicable:
        assert min(choice.shards.sizes) > 0
    if choice.plan == "segments":
        assert segments.local(choice.shards)
    if forced in choice.seconds:
        assert choice.plan == forced
    else:
        assert choice.seconds[choice.plan] == min(choice.seconds.values())


def test_calibrated_links_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_link("auto", "cpu", 4) == LINKS["gloo"]
    store_link(LINKS["pcie"], "cpu", 4)
    assert find_link("auto", "cpu", 4) == LINKS["pcie"]
    assert find_link("auto", "cpu", 2) == LINKS["gloo"] == find_link("gloo", "cpu", 4)


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"name": "x"}', '{"name": "x", "latency": 1, "bandwidth": 0, "compute": 1}']
)
def test_a_damaged_calibration_is_named(tmp_path, monkeypatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_link(LINKS["pcie"], "cpu", 4).write_text(content)
    with pytest.raises(InputError, match="triton-sp calibrate") as raised:
        find_link("auto", "cpu", 4)
    assert raised.value.field == str(tmp_path / "triton_sp" / "link-cpu-4.json")
