"""What a rank works out of its images only is what it would have picked from the tables of the whole batch."""

from __future__ import annotations

import pytest
import torch
from kit import tiny, zoo

import triton_sp
from triton_sp.config import SPConfig
from triton_sp.ranks import groups
from triton_sp.wrappers.install import installation_of
from triton_sp.wrappers.towers.patches import Patches, cut_patches

GRID = torch.tensor([[1, 4, 6], [2, 2, 2], [1, 8, 4], [1, 2, 2]])


def _patches(case: tiny.Case, ranks: int, rank: int, plan: str) -> Patches:
    with groups.fake_world(ranks, rank):
        model = case.model()
        triton_sp.wrap(model, config=SPConfig(plan=plan, check="off", single=True))
        installation = installation_of(model)
        assert installation is not None
        (stack,) = installation.anatomy.towers
        return cut_patches(stack, installation.config, installation.group, GRID, torch.device("cpu"))


@pytest.mark.parametrize("plan", ["heads", "segments", "replicate"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_tables_are_those_of_the_own_patches(name: str, plan: str) -> None:
    """With windows (Qwen2.5-VL) and with weights of positions (Qwen3-VL)."""
    case = next(case for case in zoo.qwen_cases() if case.name == name)
    whole = _patches(case, 1, 0, "replicate")
    parts = [_patches(case, 3, rank, plan) for rank in range(3)]
    assert {part.streams.choice.plan for part in parts} == {plan}
    names = sorted({"position_ids", "interp_indices", "interp_weights"} & set(whole.arguments))
    assert len(names) == (3 if name == "qwen3_vl" else 1)
    for table in names:
        rows = [part.arguments[table] for part in parts]
        found = rows[0] if plan == "replicate" else torch.cat(rows)
        torch.testing.assert_close(found, whole.arguments[table], rtol=0, atol=0)
