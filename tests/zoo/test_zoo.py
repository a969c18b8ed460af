"""A spread of the zoo: one class of each way in which models differ. `make zoo` runs all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo.build import build, classes
from zoo.verdict import judge, reference

from triton_sp.anatomy.find import find_parts
from triton_sp.errors import UnsupportedModelError

EXACT = set((Path(__file__).parents[1] / "data/zoo_exact.txt").read_text().split())
# Gemma 2's attention is eager, Phi-3.5 MoE's router has jitter, BART numbers its tokens and does not shift its labels,
# RoBERTa's positions follow from its ids, Gemma 3n makes inputs for each layer before its masks, and Mamba 2 has no
# attention.
SPREAD = [("vlm", "aya_vision"), ("vlm", "glm4v_moe"), ("vlm", "exaone4_5")]
# Images of different numbers on the ranks, a Q-Former; rotations of one image, without rows for the tokens before it.
SPREAD += [("vlm", "gemma4"), ("vlm", "blip-2"), ("vision", "dinov3_vit")]
SPREAD += [("causal", name) for name in ("gemma2", "phimoe", "bart", "roberta", "gemma3n_text", "mamba2")]


@pytest.mark.parametrize(("kind", "model_type"), SPREAD)
def test_is_exact(ranks, kind: str, model_type: str) -> None:
    name = dict(classes(kind))[model_type]
    assert name in EXACT
    for found in ranks.run(judge, model_type, name, kind, 2, ranks=2):
        assert found.verdict == "exact", found


def test_numbers_of_tokens_are_not_those_of_heads_rows(ranks) -> None:
    """Llama 4 numbers its tokens by an arange; on three ranks, of as many tokens as a head has rows there, ours had its
    numbers too, and logits were off 1 %."""
    for found in ranks.run(judge, "llama4", "Llama4ForConditionalGeneration", "vlm", 3, ranks=3):
        assert found.verdict == "exact", found


def test_what_cannot_be_judged_is_told(ranks) -> None:
    """And is no success: a model that does not run by itself, and one that is refused."""
    for found in ranks.run(judge, "pix2struct", "Pix2StructForConditionalGeneration", "vlm", 2, ranks=2):
        assert found.verdict == "not built" and found.reason
    for found in ranks.run(judge, "mobilevit", "MobileViTModel", "vision", 2, ranks=2):
        assert found.verdict == "refused" and "no attention" in found.reason
    for found in ranks.run(judge, "cpmant", "CpmAntForCausalLM", "causal", 2, ranks=2):  # it reads ids on its way
        assert found.verdict == "refused" and "this rank's part of the tokens" in found.reason
    # Its recurrence is not known, which is told before anything runs.
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        find_parts(build("mamba", "MambaForCausalLM", "causal"))


@pytest.mark.parametrize("draw", [lambda x: torch.nn.functional.dropout(x, 0.5), lambda x: x / 0])
def test_what_does_not_repeat_itself_is_no_reference(draw) -> None:
    """Three classes were called wrong because of it."""

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return type("Out", (), {"loss": draw(super().forward(x)).square().mean()})  # type: ignore[return-value]

    with pytest.raises(ValueError, match="the same twice"):
        reference(Model(16, 16), {"x": torch.ones(4, 16)})
