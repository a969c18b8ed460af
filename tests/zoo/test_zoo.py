"""A spread of the zoo: one class of each way in which models differ. `make zoo` runs all."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.build import classes
from zoo.verdict import judge

EXACT = set((Path(__file__).parents[1] / "data/zoo_exact.txt").read_text().split())
SPREAD = [("vlm", "aya_vision"), ("vlm", "glm4v_moe"), ("vlm", "exaone4_5")]


@pytest.mark.parametrize(("kind", "model_type"), SPREAD)
def test_is_exact(ranks, kind: str, model_type: str) -> None:
    name = dict(classes(kind))[model_type]
    assert name in EXACT
    for found in ranks.run(judge, model_type, name, kind, 2, ranks=2):
        assert found.verdict == "exact", found


def test_what_cannot_be_judged_is_told(ranks) -> None:
    """And is no success: a model that does not run by itself, and one that is refused."""
    for found in ranks.run(judge, "blip", "BlipForConditionalGeneration", "vlm", 2, ranks=2):
        assert found.verdict == "not built" and found.reason
    for found in ranks.run(judge, "bloom", "BloomForCausalLM", "causal", 2, ranks=2):
        assert found.verdict == "refused" and "expected" in found.reason
