"""The Hugging Face Trainer and accelerate, without a subclass: what they train is what one process trains."""

from __future__ import annotations

import pytest
import trainer_jobs

from triton_sp.errors import InputError
from triton_sp.testing import RankError


@pytest.mark.parametrize(("groups", "samples"), [(1, 5), (2, 7)])
def test_trainer(ranks, groups: int, samples: int) -> None:
    """Weights, the logged loss, and the loss of an evaluation; with samples that do not fill the last step."""
    for error in ranks.run(trainer_jobs.train, groups, samples, ranks=2 * groups):
        assert error["steps"] == 0
        assert error["weights"] < 1e-4 and error["loss"] < 1e-4 and error["eval"] < 1e-4, error


def test_predict_with_generate(ranks) -> None:
    """The prompt sharded, token for token what one process generates; the loss beside it sharded too."""
    for found, expected, loss in ranks.run(trainer_jobs.predict, ranks=2):
        assert found == expected
        assert abs(loss - 1) < 1e-4


def test_accelerate(ranks) -> None:
    assert max(ranks.run(trainer_jobs.accelerate, ranks=4)) < 1e-4


@pytest.mark.parametrize("axis", ["sp_size", "tp_size"])
def test_accelerate_that_divides_batches_itself(ranks, axis: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(trainer_jobs.accelerate_dividing, axis, ranks=2)
    for error in raised.value.errors.values():
        assert isinstance(error, InputError) and error.field == f"ParallelismConfig.{axis}"
