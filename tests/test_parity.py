"""Loss, logits and the gradient of every parameter of every model, on 1 to 4 ranks, against one process."""

from __future__ import annotations

import parity
import pytest
import torch
import zoo

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def plans(case: zoo.Case) -> list[dict]:
    """Every batch without checkpointing, and the batches that have tripped checkpointing with both kinds of it."""
    every = [{"batch_name": batch} for batch in case.batches]
    tricky = "image_and_video" if "image_and_video" in case.batches else next(iter(case.batches))
    return every + [{"batch_name": tricky, "checkpointing": kind} for kind in ("reentrant", "non_reentrant")]


def check(case: zoo.Case, results: list[list[parity.Parity]], asked: list[dict]) -> None:
    tolerance = TOLERANCE[case.dtype]
    for rank, found in enumerate(results):
        for plan, result in zip(asked, found, strict=True):
            where = f"{case.name} {plan} rank {rank}: {result}"
            assert len(set(result.losses)) == 1, where
            assert result.loss <= min(tolerance, 1e-6), where
            assert result.model_loss <= 1e-6, where
            assert result.logits <= tolerance, where
            assert result.gradient <= tolerance, where


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", zoo.CASES)
def test_parity(ranks, name: str, size: int) -> None:
    case = zoo.CASES[name]
    if size not in case.ranks:
        return
    asked = plans(case)
    check(case, ranks.run(parity.run_all, name, asked, ranks=size), asked)
