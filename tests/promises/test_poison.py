"""Parity with every fresh buffer filled with NaN: nothing is read that was not written."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from kit import parity, zoo

from triton_sp.testing import poisoned_memory

FEW = {"qwen2_5_vl": "left_pad", "internvl": "right_pad", "llava": "no_images", "llama": "packed"}


def run(name: str, batch: str, reference: Path) -> parity.Parity:
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        return parity.run(zoo.CASES[name], parity.Plan(batch), reference)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(name, batch, marks=() if FEW.get(name) == batch else pytest.mark.long)
        for name, case in zoo.CASES.items()
        for batch in case.batches
    ],
)
def test_parity_in_poisoned_memory(ranks, reference, name: str, batch: str) -> None:
    for result in ranks.run(run, name, batch, reference(name, batch), ranks=2):
        result.assert_within(parity.TOLERANCE[zoo.CASES[name].dtype])
