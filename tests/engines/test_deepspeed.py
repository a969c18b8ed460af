"""DeepSpeed, where it is installed (`make engines` does): every ZeRO stage trains what one process trains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triton_sp.testing import RankPool

pytest.importorskip("deepspeed", reason="make engines installs it")
import deepspeed_jobs
import trainer_jobs


@pytest.fixture
def ranks() -> Iterator[RankPool]:
    """New processes for each test: DeepSpeed numbers modules through a process's life, and ranks must agree on it."""
    pool = RankPool()
    yield pool
    pool.close()


pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("size", "whose_mpu"), [(2, "triton_sp"), (4, "triton_sp"), (4, "none"), (2, "deepspeed"), (4, "deepspeed")]
)
def test_weights_after_training(ranks, size: int, whose_mpu: str) -> None:
    for errors in ranks.run(deepspeed_jobs.train, "qwen2_5_vl", whose_mpu, ranks=size, timeout=1000):
        assert set(errors) == {0, 1, 2, 3} and max(errors.values()) < 2e-4, errors


@pytest.mark.parametrize(("groups", "stage"), [(1, 2), (2, 2), (1, 3)])
def test_trainer(ranks, groups: int, stage: int) -> None:
    """The Hugging Face Trainer with DeepSpeed in it: as in test_trainer.py."""
    for error in ranks.run(trainer_jobs.train, groups, 8, stage, ranks=2 * groups, timeout=1000):
        assert error["steps"] == 0
        assert error["weights"] < 1e-4 and error["loss"] < 1e-4 and error["eval"] < 1e-4, error


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints(ranks, tmp_path, stage: int) -> None:
    """Saved by groups of 2, loaded by a group of 4, and by the model without triton_sp."""
    saved = ranks.run(deepspeed_jobs.save, "qwen2_5_vl", stage, str(tmp_path), ranks=2, timeout=1000)
    for loss in ranks.run(deepspeed_jobs.load, "qwen2_5_vl", stage, str(tmp_path), ranks=4, timeout=1000):
        assert loss == pytest.approx(saved[0], rel=1e-5)
    assert deepspeed_jobs.load_unwrapped("qwen2_5_vl", str(tmp_path)) == pytest.approx(saved[0], rel=1e-5)
