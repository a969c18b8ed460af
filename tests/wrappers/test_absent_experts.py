"""Experts for which a rank has no token: on every rank they have a gradient, if in one process they have one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from kit import parity, tiny, zoo
from kit.parity import TOLERANCE, Plan, heads, hold

RANKS = 3


def two_tokens(dtype: torch.dtype) -> tiny.Batch:
    return tiny.collate([tiny.text_row(2, torch.Generator().manual_seed(0))], None)


def run_two_tokens(name: str, path: Path) -> parity.Parity | None:
    """The reference, if there is none yet; else a rank, and the last of three has no token."""
    case = replace(zoo.CASES[name], batches={"two": two_tokens})
    if not path.exists():
        parity.write_reference(case, "two", path)
        return None
    with mock.patch.dict(zoo.CASES, {name: case}):
        return parity.run(case, Plan("two", config=heads(RANKS)), path)


# Experts that loop over those that are chosen; gpt-oss hands them their arguments by name.
@pytest.mark.parametrize("name", ["deepseek_v3_5", "gpt_oss"])
def test_a_rank_without_tokens(ranks, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    run_two_tokens(name, path)
    for found in ranks.run(run_two_tokens, name, path, ranks=RANKS):
        found.assert_within(TOLERANCE[zoo.CASES[name].dtype])


def test_ranks_with_tokens_of_one_type(ranks, reference) -> None:
    """A rank whose part lies within an image has no use for experts for text, one before it none for images."""
    plans = [Plan("plain", config=heads(RANKS)), Plan("left_pad", "non_reentrant", heads(RANKS))]
    hold(ranks, reference, "ernie4_5_vl_moe", plans, RANKS)
