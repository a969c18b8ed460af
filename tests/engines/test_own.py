"""Loaders that a trainer divides by rank itself, as ms-swift does: a group trains on what its ranks would have had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from triton_sp.engines.batches import Sharing
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
    loader = own_batches(SimpleNamespace(_dataloaders=[]), Sharing(group, 1 << 20), OwnLoader, broken)
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
    made = own_batches(SimpleNamespace(_dataloaders=[prepared]), Sharing(group, 1 << 20), lambda: prepared)
    return made is prepared and not isinstance(
        own_batches(SimpleNamespace(_dataloaders=[]), Sharing(group, 1 << 20), lambda: shared), BatchesOfRanks
    )


def test_what_is_shared_already(ranks) -> None:
    assert all(ranks.run(leaves_alone, ranks=2))


def read_alike(numbers: list[int], epochs: int, size: int | None = None) -> list[list[int]]:
    """A loader that gives every rank of a group all numbers, one after another."""
    group = groups.resolve_group(groups.neighbours(size))
    batches = [{"input_ids": torch.tensor([number]), "text": "a sentence"} for number in numbers]
    loader = own_batches(SimpleNamespace(_dataloaders=[]), Sharing(group, 1 << 20), lambda: batches)
    return [[int(batch["input_ids"]) for batch in loader] for _ in range(epochs)]


def test_loader_that_gives_all_ranks_the_same(ranks) -> None:
    """They would train on each batch twice. In groups too: the other group's batches do not matter."""
    with pytest.raises(RankError) as raised:
        ranks.run(read_alike, [3, 4, 5], 1, ranks=2)
    assert {rank: type(error) for rank, error in raised.value.errors.items()} == {0: InputError, 1: InputError}
    assert all("triton_sp.share_batches(loader, group)" in str(error) for error in raised.value.errors.values())
    with pytest.raises(RankError) as raised:
        ranks.run(read_alike, [3, 4, 5], 1, 2, ranks=4)
    assert {rank: type(error) for rank, error in raised.value.errors.items()} == dict.fromkeys(range(4), InputError)


def read_partly_alike() -> list[int]:
    """Divided by rank, and of the numbers the first two are equal."""
    numbers = [7, 7, 8, 9, 1, 1, 2, 2][dist.get_rank() :: 2]
    loader = own_batches(
        SimpleNamespace(_dataloaders=[]), Sharing(groups.resolve_group(None), 1 << 20), lambda: numbers
    )
    return list(loader)


def test_data_that_repeats_itself(ranks) -> None:
    """Equal batches tell nothing where there is one sample only, or where another batch differs."""
    assert ranks.run(read_alike, [3, 3, 3], 2, ranks=2) == [[[3] * 6] * 2] * 2
    assert ranks.run(read_alike, [3], 2, ranks=2) == [[[3] * 2] * 2] * 2
    assert ranks.run(read_partly_alike, ranks=2) == [[7, 7, 8, 9, 1, 1, 2, 2]] * 2
