"""Checkpoints do not depend on the ranks that wrote them: save on 2 ranks, go on with 4 and with 1."""

from __future__ import annotations

from pathlib import Path

import checkpoint_jobs
import pytest


@pytest.mark.parametrize(
    "engine", [pytest.param("loop", marks=pytest.mark.long), pytest.param("ddp", marks=pytest.mark.long), "fsdp2"]
)
def test_distributed_checkpoint(ranks, engine: str, tmp_path: Path) -> None:
    """torch.distributed.checkpoint of model and optimizer."""
    for size, first, stop in ((2, 0, 2), (4, 2, 4), (1, 4, 6)):
        assert max(ranks.run(checkpoint_jobs.go_on, engine, tmp_path, first, stop, ranks=size)) < 2e-4


def test_resume_in_mid_epoch(ranks, tmp_path: Path) -> None:
    """A Trainer of 5 batches in an epoch and 3 steps: what has been seen is skipped unread, and each rank reads every
    second of the others."""
    (error, _), _ = ranks.run(checkpoint_jobs.resume, tmp_path, 0, 4, {}, ranks=2)
    assert error < 1e-4
    found = ranks.run(checkpoint_jobs.resume, tmp_path, 4, 6, {}, ranks=2)
    assert max(error for error, _ in found) < 1e-4
    assert [reads for _, reads in found] == [2, 1]


@pytest.mark.long
def test_resume_on_other_ranks(ranks, tmp_path: Path) -> None:
    """A Trainer's checkpoint of 2 ranks goes on with 4 and with 1."""
    for size, first, stop in ((2, 0, 4), (4, 4, 5), (1, 5, 6)):
        errors = [error for error, _ in ranks.run(checkpoint_jobs.resume, tmp_path, first, stop, {}, ranks=size)]
        assert max(errors) < 1e-4
