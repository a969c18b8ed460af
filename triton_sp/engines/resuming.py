"""The ranks of a group still take turns in loading after accelerate has taken their loader apart.

To skip the batches that a checkpoint has seen already (`accelerate.skip_first_batches`, which a Trainer calls when it
resumes in the middle of an epoch), accelerate makes a new loader of the dataset, the batch sampler and the collate
function of the old one. So what it finds there are these: a sampler that numbers its batches, and a dataset that a rank
reads only if a batch's number is its turn. The batch is handed out when accelerate moves it to the device, which all
ranks do in the same order, in their own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset

from triton_sp.engines.batches import SharedBatches, Sharing, from_source
from triton_sp.ranks.groups import Group

_numbers = count()
_loaders: WeakValueDictionary[int, ResumableBatches] = WeakValueDictionary()


class NumberedBatches:
    """A batch sampler whose batches are lists of (number of the batch, index of a sample)."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        return ([(number, index) for index in batch] for number, batch in enumerate(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._batches, name)


class Turn:
    """A batch on the rank that has loaded it, and on the others the promise of it."""

    def __init__(self, loader: int, source: int, loaded: Any) -> None:
        self.loader, self.source, self.loaded = loader, source, loaded

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The batch on every rank, on its device."""
        from accelerate.utils import send_to_device

        batch = from_source(self._load, self.source, _loaders[self.loader].sharing)
        return send_to_device(batch, device, non_blocking=non_blocking)

    def _load(self) -> Any:
        if isinstance(self.loaded, ExceptionWrapper):
            self.loaded.reraise()
        return self.loaded


class SamplesInTurns(Dataset[Any]):
    """The dataset, as a loader with `NumberedBatches` reads it: `collate` loads a whole batch, or none of it."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], loader: int, group: Group) -> None:
        self._dataset, self._collate = dataset, collate
        self._loader, self._rank, self._size = loader, group.rank, group.size

    def __getitems__(self, numbered: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        return numbered

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def collate(self, numbered: list[tuple[int, Any]]) -> Turn:
        """The turn of a batch, with the batch on the rank whose turn it is."""
        source, loaded = numbered[0][0] % self._size, None
        if source == self._rank:
            try:
                loaded = self._collate(self._samples([index for _, index in numbered]))
            except Exception:  # of a dataset of anybody's: the other ranks wait for this one
                loaded = ExceptionWrapper(where=f"loading a batch on rank {self._rank}")
        return Turn(self._loader, source, loaded)

    def _samples(self, indices: list[Any]) -> list[Any]:
        if getattr(self._dataset, "__getitems__", None):
            return list(self._dataset.__getitems__(indices))
        return [self._dataset[index] for index in indices]


class ResumableBatches(SharedBatches):
    """`SharedBatches` of which accelerate can make a loader that begins later.

    Attributes:
        number: what `Turn` finds it by, in whichever process a turn was made.
    """

    def __init__(self, loader: DataLoader[Any], sharing: Sharing) -> None:
        self.number = next(_numbers)
        super().__init__(loader, sharing)
        _loaders[self.number] = self

    def outer(self, loader: DataLoader[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the loader that others see."""
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            return super().outer(loader, options)
        samples = SamplesInTurns(loader.dataset, options["collate_fn"], self.number, self.sharing.group)
        numbered: Any = NumberedBatches(loader.batch_sampler)
        return options | {"dataset": samples, "collate_fn": samples.collate, "batch_sampler": numbered}
