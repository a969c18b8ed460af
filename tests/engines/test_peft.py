"""Adapters and frozen parts train as in one process."""

from __future__ import annotations

import peft_jobs
import pytest


@pytest.mark.parametrize("what", peft_jobs.FROZEN)
def test_frozen_parts(ranks, what: str) -> None:
    assert max(ranks.run(peft_jobs.frozen, "llava", what, ranks=2)) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("what", peft_jobs.FROZEN)
@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_frozen_parts_with_checkpointing(ranks, name: str, what: str, checkpointing: str) -> None:
    assert max(ranks.run(peft_jobs.frozen, name, what, checkpointing, ranks=2)) < 1e-6


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_autocast(ranks, name: str) -> None:
    """bf16 has 8 bits: the sharded step is as far from the whole one as rounding in another order takes it."""
    assert max(ranks.run(peft_jobs.frozen, name, "nothing", "none", True, ranks=2)) < 0.1


# On the tower, the projector and the decoder.
LAYERS = r".*(q_proj|k_proj|v_proj|fc1|fc2|linear_1|linear_2|gate_proj|down_proj|qkv|merger\.mlp\.0)"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("order", ["wrap_first", "peft_first"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_lora(ranks, name: str, order: str, checkpointing: str) -> None:
    assert max(ranks.run(peft_jobs.lora, name, order, checkpointing, LAYERS, ranks=2)) < 1e-6
