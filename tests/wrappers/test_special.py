"""Models whose attention, positions or tokens are special: parity with one process, and mutants that it notices."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from kit import parity, zoo
from kit.parity import Plan, heads, hold

from triton_sp.wrappers import attention, layout

# In the suite, on two ranks; head counts that these do not divide are in the cases themselves.
QUICK = {
    "deepseek_v3_5": [Plan("left_pad", config=heads(2))],
    "gpt2": [Plan("packed", config=heads(2))],
    "opt": [Plan("left_pad", "non_reentrant", heads(2))],
    "llama4_text": [Plan("packed", "non_reentrant", heads(2)), Plan("left_pad", config=heads(2))],
}


@pytest.mark.parametrize("name", QUICK)
def test_parity(ranks, reference, name: str) -> None:
    hold(ranks, reference, name, QUICK[name], 2)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", [case.name for case in zoo.special.cases()])
def test_parity_of_everything(ranks, reference, name: str, size: int) -> None:
    """Every batch, and checkpointing of both kinds, in float64."""
    case, config = zoo.CASES[name], heads(size)
    tricky = next(batch for batch in ("image_and_video", "packed", "left_pad") if batch in case.batches)
    plans = [Plan(batch, config=config) for batch in case.batches]
    plans += [Plan(tricky, kind, config) for kind in ("reentrant", "non_reentrant")]
    hold(ranks, reference, name, plans, size)


# name: the model and the batch that show it, and what is replaced by what
MUTANTS: dict[str, tuple[str, str, Any, str, Any]] = {
    "chunks ignored": ("llama4_text", "plain", layout, "CHUNKED", "no such layers"),
    "tokens numbered on the shard": ("llama4_text", "plain", attention, "numbers_its_tokens", lambda module: False),
}


def run_mutant(mutant: str, path: Any) -> parity.Parity:
    name, batch, owner, attribute, broken = MUTANTS[mutant]
    with mock.patch.object(owner, attribute, broken):
        return parity.run(zoo.CASES[name], Plan(batch, config=heads(2)), path)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_notices(ranks, reference, mutant: str) -> None:
    for result in ranks.run(run_mutant, mutant, reference(*MUTANTS[mutant][:2]), ranks=2):
        assert result.gradient > 1e-4, result
