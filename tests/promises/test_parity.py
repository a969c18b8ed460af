"""Loss, logits and the gradient of every parameter of every model, on 1 to 4 ranks, against one process."""

from __future__ import annotations

import pytest
from kit import tiny, zoo
from kit.parity import Plan, checkpointed, heads, hold, run_bitwise

from triton_sp import SPConfig


def plans(case: tiny.Case, size: int) -> list[Plan]:
    """Every batch without checkpointing, and the one most likely to trip checkpointing with both kinds of it.

    Heads are exchanged; test_plans.py has the other plans.
    """
    config = heads(size)
    tricky = "image_and_video" if "image_and_video" in case.batches else next(iter(case.batches))
    return [Plan(batch, config=config) for batch in case.batches] + checkpointed(case, tricky, config)


# One of each mechanism: windows, DeepStack, tiles, images that see themselves, prefixes, heads that do not divide.
EVERY_PLAN = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "idefics2", "gemma3", "paligemma", "llama",
              "llama_28_4", "vit")  # fmt: skip


def share_of_plans(name: str, size: int) -> list[Plan]:
    """On 2 ranks all of them, or every other one of models that share their code with one of those; on 3 and on 4 a
    third each. `make all-plans` runs all on each."""
    found = plans(zoo.CASES[name], size)
    if size == 2:
        return found if name in EVERY_PLAN else found[len(name) % 2 :: 2]
    return found[size - 2 :: 3]


def sizes(case: tiny.Case, number: int) -> list[int]:
    """2 ranks, and 3 or 4 in turn."""
    found = [size for size in case.suite if size in case.ranks]
    return [2, 3 + number % 2] if found == [2, 3, 4] else found


SIZES = [(name, size) for number, (name, case) in enumerate(zoo.CASES.items()) for size in sizes(case, number)]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_parity(ranks, reference, name: str, size: int) -> None:
    hold(ranks, reference, name, share_of_plans(name, size), size)


@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if case.suite])
def test_one_rank_is_bitwise_the_model(ranks, name: str) -> None:
    assert ranks.run(run_bitwise, name, ranks=1) == [[]]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "llama", "gemma3"])
def test_one_rank_on_packed_tokens(ranks, reference, name: str) -> None:
    """SPConfig(single=True): nothing is exchanged, and nothing is padded."""
    case = zoo.CASES[name]
    plans = [Plan(batch, config=SPConfig(single=True)) for batch in list(case.batches)[:3]]
    hold(ranks, reference, name, plans, 1)
