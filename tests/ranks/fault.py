"""What the cases of faults.py are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from kit import tiny, zoo
from torch import nn

from triton_sp import errors

CASE = zoo.CASES["llava"]


@dataclass(frozen=True)
class Fault:
    """A case: what runs on each rank, and whether that is the right result or an error.

    Attributes:
        raises: the errors of the ranks that the fault is not on; None where the result is right.
    """

    run: Callable[[], None]
    raises: type[errors.SPError] | None = None
    names_rank: bool = True


def fresh() -> nn.Module:
    return CASE.model()


def batch(name: str = "plain") -> tiny.Batch:
    return CASE.batch(name)


def text(length: int, rows: int = 1) -> tiny.Batch:
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def culprit() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def layer(model: nn.Module) -> nn.Module:
    """Where a fault strikes in the middle of a step."""
    return model.model.language_model.layers[1].mlp


def step(model: nn.Module, inputs: tiny.Batch) -> torch.Tensor:
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()
