"""Laws of cutting at segments, and of the choice between plans."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import segments_of

from triton_sp.errors import InputError
from triton_sp.plan.cost import LINKS, Layers, Link, choose_plan, find_link, store_link
from triton_sp.plan.segments import Segments, shard_segments
from triton_sp.plan.shards import Shards, shard_tokens

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


def seconds_by_hand(lengths: list[int], ranks: int, unit: int, stack: Layers, link: Link) -> dict[str, float]:
    """The model of a step as docs/plans.md tells it, rank by rank and row by row: work of the busiest rank, latency of
    every collective, and the bytes that a rank sends to others."""
    rows = [(index, row) for index, length in enumerate(lengths) for row in range(length)]
    keys = [row + 1 if stack.causal else lengths[index] for index, row in rows]
    linear, product = 6 * 12 * stack.width**2, 7 * 2 * stack.q  # FLOP of a token, and of a (row, key) pair of all heads
    flops = [linear + product * count for count in keys]
    end = 2 * (link.latency + len(rows) * stack.width * stack.itemsize * (1 - 1 / ranks) / link.bandwidth)
    most = max(shard_tokens(len(rows), ranks, unit).sizes)
    keyed = max(stack.kv, ranks * stack.head_dim)  # channels of the keys that all ranks are sent together
    sent = most * stack.itemsize * (stack.q + keyed + keyed + stack.q) * (1 - 1 / ranks)  # q, k, v and the outputs
    layer = (most * linear + product * sum(keys) / ranks) / link.compute
    layer += 2 * (2 * link.latency + sent / link.bandwidth)  # two exchanges in the forward, two in the backward
    found = {"heads": stack.count * layer + end, "replicate": stack.count * sum(flops) / link.compute}
    starts = list(itertools.accumulate(lengths, initial=0))
    costs = [sum(flops[a:b]) for a, b in itertools.pairwise(starts)]
    cut = shard_segments(Segments(tuple(starts)), ranks, costs, unit)
    if cut is not None:
        loads = [sum(flops[i] for i in cut.range(rank)) for rank in range(ranks)]
        found["segments"] = stack.count * max(loads) / link.compute + end
    return found


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40).map(lambda n: 4 * n), min_size=1, max_size=12).filter(any),
    st.integers(1, 7),
    st.sampled_from([1, 4]),
    st.builds(Layers, *[st.integers(1, 40)] * 5, st.sampled_from([2, 4, 8]), st.booleans()),
    st.builds(Link, st.just("x"), st.floats(1e-6, 1e-3), st.floats(1e3, 1e9), st.floats(1e6, 1e12)),
)
def test_the_model_is_its_formula(lengths: list[int], ranks: int, unit: int, stack: Layers, link: Link) -> None:
    expected = seconds_by_hand(lengths, ranks, unit, stack, link)
    choice = choose_plan(segments_of(lengths), ranks, unit, stack, link, "auto", False)
    assert choice.seconds == pytest.approx({k: v for k, v in expected.items() if k != "replicate"})
    choice = choose_plan(segments_of(lengths), ranks, unit, stack, link, "auto", True)
    if min(shard_tokens(sum(lengths), ranks, unit).sizes) == 0:
        del expected["heads"]  # a rank without tokens cannot take part in the tower
    assert choice.seconds == pytest.approx(expected)
    assert choice.plan == min(choice.seconds, key=choice.seconds.__getitem__)


def test_a_choice_says_why() -> None:
    def why(forced: str, replicable: bool = True) -> str:
        return choose_plan(segments_of([64] * 256), 8, 4, TOWER, LINKS["pcie"], forced, replicable).why

    found = choose_plan(segments_of([64] * 256), 8, 4, TOWER, LINKS["pcie"], "auto", True)
    texts = [f"{name} {found.seconds[name] * 1000:.3g} ms" for name in ("heads", "segments", "replicate")]
    assert why("auto") == f"fastest by the model of pcie ({', '.join(texts)} a step)"
    assert why("segments") == "as SPConfig.plan says"
    assert why("replicate", False).startswith("SPConfig.plan='replicate' is not possible here; fastest by the model")


def test_a_layout_that_was_there_before_is_not_planned_again() -> None:
    layers = Layers(count=2, width=64, q=64, kv=64, head_dim=16, itemsize=2)
    first, again, other = (
        choose_plan(Segments(starts), 2, 1, layers, LINKS["nvlink"], "auto", False)
        for starts in (tuple(range(0, 99, 3)), tuple(range(0, 99, 3)), tuple(range(0, 102, 3)))
    )
    assert first is again and other.shards.total == 99 == first.shards.total + 3


def test_fewer_segments_than_ranks_use_the_cut_that_is_given() -> None:
    """What a tower owns already: some ranks have no tokens, and nothing travels."""
    owned = Shards((64, 0, 64))
    choice = choose_plan(segments_of([64, 64]), 3, 4, TOWER, LINKS["pcie"], "segments", False, owned)
    assert (choice.plan, choice.shards) == ("segments", owned)
    alone = choose_plan(segments_of([64]), 1, 4, TOWER, LINKS["pcie"], "segments", False)
    assert choice.seconds["segments"] > alone.seconds["segments"]  # the same work, and the gather at the end


def test_links_are_those_of_the_documents() -> None:
    """docs/plans.md names the default links, so that they can be compared with measured ones."""
    pattern = r"^\| `(\w+)` \| (\d+) us \| (\d+) GB/s \| (\S+) TFLOP/s \|$"
    rows = re.findall(pattern, (Path(__file__).parents[2] / "docs" / "plans.md").read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == list(LINKS)
    for name, *numbers in rows:
        microseconds, gigabytes, teraflops = map(float, numbers)
        assert LINKS[name] == Link(name, microseconds / 1e6, gigabytes * 1e9, teraflops * 1e12)


def test_calibrated_links_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_link("auto", "cpu", 4) == LINKS["gloo"]
    store_link(LINKS["pcie"], "cpu", 4)
    assert find_link("auto", "cpu", 4) == LINKS["pcie"]
    assert find_link("auto", "cpu", 2) == LINKS["gloo"] == find_link("gloo", "cpu", 4)
    assert find_link("auto", "cuda", 4) == LINKS["nvlink"]
    store_link(LINKS["nvlink"], "cpu", 4)  # measured again in the same process
    assert find_link("auto", "cpu", 4) == LINKS["nvlink"]


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"name": "x"}']
    + [
        f'{{"name": {name}, "latency": {latency}, "bandwidth": {bandwidth}, "compute": {compute}}}'
        for name, latency, bandwidth, compute in [
            ('"x"', 1, 0, 1),
            ('"x"', -1, 1, 1),
            ('"x"', 1, 1, "Infinity"),
            ('"x"', 1, 1, "NaN"),
            ('"x"', 1, "true", 1),
            ('"x"', 1, 1, '"1"'),
            ("3", 1, 1, 1),
        ]
    ],
)
def test_a_damaged_calibration_is_named(tmp_path, monkeypatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_link(LINKS["pcie"], "cpu", 4).write_text(content)
    with pytest.raises(InputError, match="triton-sp calibrate") as raised:
        find_link("auto", "cpu", 4)
    assert raised.value.field == str(tmp_path / "triton_sp" / "link-cpu-4.json")
