"""Loaders for groups: every rank gets the same batches, in the order of one process, and each decodes its turns."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler
from trainer_jobs import as_torchrun

import triton_sp
from triton_sp import errors
from triton_sp.testing import RankError


class Pictures(Dataset[Any]):
    """Of different sizes and types, and what goes with them. Counts what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        self.decoded.append(index)
        generator = torch.Generator().manual_seed(index)
        picture = torch.randn(3, index, 5, generator=generator)
        return {
            "pixel_values": [picture.to(torch.bfloat16), picture.transpose(1, 2)],
            "mask": picture[0] > 0,
            "scale": (torch.tensor(index, dtype=torch.int16), None, 0.5 * index, f"picture {index}"),
        }


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        assert dist.get_rank() == 0, "read on another rank"
        yield from (torch.full((index,), index) for index in range(5))


def only(batch: list[Any]) -> Any:
    return batch[0]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


def read() -> list[int]:
    data = Pictures()
    shared = triton_sp.share_batches(DataLoader(data, collate_fn=only))
    assert len(shared) == 7
    for _ in range(2):  # epochs
        batches = list(shared)
        assert len(batches) == 7 and all(same(batch, Pictures()[i]) for i, batch in enumerate(batches))
    return data.decoded


def test_same_batches_everywhere_and_each_decodes_its_turns(ranks) -> None:
    for rank, decoded in enumerate(ranks.run(read, ranks=3)):
        assert decoded == 2 * list(range(rank, 7, 3))


def read_others() -> None:
    streamed = list(triton_sp.share_batches(DataLoader(Stream(), batch_size=None)))
    assert [batch.tolist() for batch in streamed] == [[index] * index for index in range(5)]
    # in groups of two of four, with a sampler of lists, in an order that is drawn
    group, drawn = dist.new_subgroups(2)[0], torch.Generator().manual_seed(dist.get_rank() // 2)
    sampler = BatchSampler(RandomSampler(range(9), generator=drawn), 2, drop_last=False)
    loader = DataLoader(torch.arange(9), sampler=sampler, batch_size=None)  # type: ignore[arg-type]
    batches = [batch.tolist() for batch in triton_sp.share_batches(loader, group)]
    assert sorted(chain(*batches)) == list(range(9)) and [len(batch) for batch in batches] == [2, 2, 2, 2, 1]


def test_streams_and_groups(ranks) -> None:
    ranks.run(read_others, ranks=4)


class Broken(Pictures):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __getitem__(self, index: int) -> Any:
        if index < 4:
            return index
        if self.what == "unreadable":
            raise OSError("no such picture")
        return {"pixel_values": [torch.zeros(1 << 10), object() if self.what == "object" else 0]}


def read_broken(what: str) -> None:
    loader = triton_sp.share_batches(DataLoader(Broken(what), collate_fn=only), limit=100)
    for _ in loader:
        pass


@pytest.mark.parametrize(
    ("what", "found"),
    [("unreadable", "no such picture"), ("object", "batch['pixel_values'][1]"), ("large", "4096 and")],
)
def test_a_batch_that_cannot_be_read(ranks, what: str, found: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(read_broken, what, ranks=3, timeout=60)
    for rank, error in raised.value.errors.items():  # it was rank 1's turn
        assert found in str(error)
        assert isinstance(error, errors.DisagreementError) == (rank != 1)


def read_after_skipping(what: str) -> list[int]:
    """Skip two batches of an accelerate loader, as a Trainer does that resumes in the middle of an epoch."""
    data = Broken(what) if what else Pictures()
    with as_torchrun():
        accelerator = triton_sp.share_batches(Accelerator(cpu=True))
        loader = accelerator.prepare(DataLoader(data, collate_fn=only))
        assert len(loader.dataset) == 7 and loader.dataset.decoded == []
        batches = list(accelerator.skip_first_batches(loader, 2))
        assert len(batches) == 5 and all(same(batch, Pictures()[i + 2]) for i, batch in enumerate(batches))
        decoded = list(data.decoded)
        assert same(list(loader)[1], Pictures()[1]), "the next epoch is whole again"
    return decoded


def test_turns_after_skipping(ranks) -> None:
    for rank, decoded in enumerate(ranks.run(read_after_skipping, "", ranks=3)):
        assert decoded == [index for index in range(2, 7) if index % 3 == rank]
    with pytest.raises(RankError) as raised:
        ranks.run(read_after_skipping, "unreadable", ranks=3, timeout=60)
    for rank, error in raised.value.errors.items():  # it was rank 1's turn
        assert "no such picture" in str(error)
        assert isinstance(error, errors.DisagreementError) == (rank != 1)


def share_a_list() -> None:
    triton_sp.share_batches([1, 2])


def test_not_a_loader(ranks) -> None:
    with pytest.raises(RankError, match="expected a torch DataLoader"):
        ranks.run(share_a_list, ranks=1)
