"""A long batch on P ranks: each makes no tensor that is longer than its share, and keeps its share for the backward."""

from __future__ import annotations

import memory
import pytest

# How much larger a rank's largest tensor may be than that of one process over P: the buffer that q, k and v travel in
# is three times as wide as a hidden state, which is the widest that this small LLaVA has in one process.
LARGEST = {"qwen2_5_vl": 1.02, "qwen3_vl": 1.02, "llava": 3.01, "internvl": 1.02}


@pytest.mark.parametrize("name", LARGEST)
def test_each_rank_holds_its_share(ranks, name: str) -> None:
    alone, size = memory.held(name, wrapped=False), 4
    for rank in ranks.run(memory.held, name, True, ranks=size):
        assert rank.loss == pytest.approx(alone.loss, rel=1e-5)
        assert rank.largest * size <= LARGEST[name] * alone.largest, rank.shape
        assert rank.saved * size <= 1.15 * alone.saved


def test_the_measure_sees_what_is_too_long(ranks) -> None:
    """The same with features gathered: the embeddings of the whole batch are on every rank then."""
    alone = memory.held("qwen2_5_vl", wrapped=False)
    for rank in ranks.run(memory.held_gathered, "qwen2_5_vl", ranks=4):
        assert rank.largest * 4 > 1.3 * alone.largest
