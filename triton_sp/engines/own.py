"""Loaders of a trainer's own, such as ms-swift's, that divide the data by rank without asking accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from triton_sp.engines.batches import NONE, SharedBatches, from_source
from triton_sp.errors import InputError
from triton_sp.ranks.groups import Group


def own_batches(accelerator: Any, group: Group, limit: int, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`Trainer.get_train_dataloader`: what `make` makes, for groups if accelerate has not made it so."""
    loader = make(*args, **kwargs)
    shared = isinstance(loader, SharedBatches) or any(loader is prepared for prepared in accelerator._dataloaders)
    return loader if shared else BatchesOfRanks(loader, group, limit)


class BatchesOfRanks:
    """The batches that a loader gives to the ranks of a group, one rank's after another, on all of them.

    So a group goes through the data that its ranks would have had. All ranks load at the same time, once every P steps,
    because such a loader may be a stream that one process reads for all.
    """

    def __init__(self, loader: Any, group: Group, limit: int) -> None:
        self._loader, self._group, self._limit = loader, group, limit

    def __len__(self) -> int:
        return len(self._loader) * self._group.size

    def __iter__(self) -> Iterator[Any]:
        own = iter(self._loader)
        while True:
            load = _loaded(own)
            for source in range(self._group.size):
                batch = from_source(load, source, self._group, self._limit)
                if batch is NONE:
                    return
                yield batch

    @property
    def sampler(self) -> Any:
        """What accelerate asks for to begin in the middle of an epoch; it would make a loader of one rank."""
        raise InputError(
            "resume_from_checkpoint",
            expected="a checkpoint from the end of an epoch: this trainer's loader cannot begin later for a group",
            found=f"{type(self._loader).__name__}, in the middle of an epoch",
            remedy="ignore_data_skip=True begins the epoch anew",
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "batch_sampler"):  # which would be that of one rank
            raise AttributeError(name)
        return getattr(self._loader, name)


def _loaded(own: Iterator[Any]) -> Callable[[], Any]:
    """Load now; what is returned or raised, comes of the result's call."""
    try:
        batch = next(own)
    except Exception as error:  # of a loader of anybody's: the other ranks wait for this one
        failure = error
    else:
        return lambda: batch

    def fail() -> Any:
        raise failure

    return fail
