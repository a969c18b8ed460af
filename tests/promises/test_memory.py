"""A long batch on P ranks: each makes no tensor that is longer than its share, and keeps its share for the backward."""

from __future__ import annotations

import memory
import pytest
from kit import zoo

# How much larger a rank's largest tensor may be than that of one process over P: the buffer that q, k and v travel in
# is three times as wide as a hidden state, which is the widest that many of these small models have in one process.
# Where it is less than 1 the one process makes something for itself that no rank does.
LARGEST = {
    "qwen3_vl": 1.02,
    "llava_onevision": 3.01,
    "gemma3": 2.01,
}
# Families that are put together like one of these: left to `make soak`.
ALIKE = {
    "qwen2_vl": 1.02,
    "qwen3_5_vl": 1.02,
    "internvl": 1.02,
    "qwen2_5_vl": 1.02,
    "glm4v": 1.02,
    "llava": 3.01,
    "paligemma": 1.7,
    "idefics3": 3.01,
    "mistral3": 0.8,
    "qwen3_vl_moe": 1.02,
    "qwen3_5_moe_vl": 1.02,
    "internvl_gpt_oss": 3.01,
    "llama4": 1.01,
    "llava_next": 1.7,
    "paligemma2": 3.01,
    "idefics2": 1.8,
    "smolvlm": 3.01,
}
WHOLE_FEATURES = {"mllama"}  # on every rank, as `explain` says
NOT_MEASURED = {
    "ernie4_5_vl_moe",
    "gemma4",
    "gemma4_causal",
    "kimi_k25",
    "lfm2_vl",
    "minicpmv4_6",
    "molmo2",
}  # routed too; the long batch of these tests does not fit them
CASES = [
    *(name for name in LARGEST if name not in zoo.FEATURES_GATHERED),
    *(pytest.param(name, marks=pytest.mark.long) for name in ALIKE),
]


@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_its_share(ranks, name: str) -> None:
    alone, size, wider = memory.held(name, wrapped=False), 4, (LARGEST | ALIKE)[name]
    for rank in ranks.run(memory.held, name, True, ranks=size):
        assert rank.loss == pytest.approx(alone.loss, rel=1e-5)
        assert rank.largest * size <= wider * alone.largest, rank.shape
        assert rank.saved * size <= 1.15 * alone.saved


def test_no_family_is_left_out() -> None:
    assert {*LARGEST, *ALIKE, *WHOLE_FEATURES, *NOT_MEASURED} == {
        name for name, case in zoo.CASES.items() if case.kind == "vlm"
    }


def test_the_measure_sees_what_is_too_long(ranks) -> None:
    """The same with features gathered: the embeddings of the whole batch are on every rank then."""
    alone = memory.held("qwen2_5_vl", wrapped=False)
    for rank in ranks.run(memory.held_gathered, "qwen2_5_vl", ranks=4):
        assert rank.largest * 4 > 1.3 * alone.largest
