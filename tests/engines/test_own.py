"""Loaders that a trainer divides by rank itself, as ms-swift does: a group trains on what its ranks would have had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from triton_sp.engines.loaders import share_batches
from triton_sp.engines.own import BatchesOfRanks, own_batches
from triton_sp.errors import DisagreementError, InputError
from triton_sp.ranks import groups
from triton_sp.testing import RankError


class OwnLoader:
    """Every P-th number. A process that reads alone waits for the others, as where one reads a stream for all."""

    dataset = range(6)

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(self.dataset) // dist.get_world_size()

    def __iter__(self) -> Any:
        for number in self.dataset[dist.get_rank() :: dist.get_world_size()]:
            dist.barrier()
            if number == self.broken:
                raise ValueError("cannot be read")
            yield {"input_ids": torch.tensor([number])}


def read(broken: int = -1) -> tuple[int, list[int]]:
    group = groups.resolve_group(None)
    loader = own_batches(SimpleNamespace(_dataloaders=[]), group, 1 << 20, OwnLoader, broken)
    assert loader.dataset == range(6) and not hasattr(loader, "batch_sampler")
    with pytest.raises(InputError, match="ignore_data_skip"):
        _ = loader.sampler
    return len(loader), [int(batch["input_ids"]) for batch in loader]


def test_all_data_on_all_ranks(ranks) -> None:
    assert ranks.run(read, ranks=2) == [(6, [0, 1, 2, 3, 4, 5])] * 2


def test_failure_on_one_rank(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(read, 3, ranks=2)
    assert {rank: type(error) for rank, error in raised.value.errors.items()} == {0: DisagreementError, 1: ValueError}


def leaves_alone() -> bool:
    """What accelerate or `share_batches` has made for groups."""
    group, prepared = groups.resolve_group(None), OwnLoader()
    shared = share_batches(DataLoader([1, 2]))
    made = own_batches(SimpleNamespace(_dataloaders=[prepared]), group, 1 << 20, lambda: prepared)
    return made is prepared and not isinstance(
        own_batches(SimpleNamespace(_dataloaders=[]), group, 1 << 20, lambda: shared), BatchesOfRanks
    )


def test_what_is_shared_already(ranks) -> None:
    assert all(ranks.run(leaves_alone, ranks=2))
