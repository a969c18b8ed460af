"""TRL, where it is installed (`make adapters` does): its trainers train what they train in one process a group."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="make adapters installs it")
import trl_jobs

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", trl_jobs.CASES)
def test_weights_after_training(ranks, tmp_path: Path, case: str, groups: int) -> None:
    """GRPO's completions depend on the process, so there the reference has a process for each group."""
    file, size = str(tmp_path / "weights.pt"), 4 if case == "grpo" else 2
    alone, more = (groups, size) if case == "grpo" else (1, size * groups)
    expected = ranks.run(trl_jobs.train, case, file, more, ranks=alone, timeout=600)[0]
    for found in ranks.run(trl_jobs.train, case, file, size, groups, groups == 1, ranks=2 * groups, timeout=600):
        assert found["moved"] > 1e-2, "the weights have changed"
        assert found["error"] < 1e-4
        assert found["exchanges"] > 0, "the work was shared out"
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
