"""Loaders of a trainer's own, such as ms-swift's, that divide the data by rank without asking accelerate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from triton_sp.engines.batches import NONE, SharedBatches, Sharing, from_source
from triton_sp.engines.wire import describe, serialise
from triton_sp.errors import InputError
from triton_sp.ranks import collectives


def own_batches(accelerator: Any, sharing: Sharing, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`Trainer.get_train_dataloader`: what `make` makes, for groups if accelerate has not made it so."""
    loader = make(*args, **kwargs)
    shared = isinstance(loader, SharedBatches) or any(loader is prepared for prepared in accelerator._dataloaders)
    return loader if shared else BatchesOfRanks(loader, sharing)


class BatchesOfRanks:
    """The batches that a loader gives to the ranks of a group, one rank's after another, on all of them.

    So a group goes through the data that its ranks would have had. All ranks load at the same time, once every P steps,
    because such a loader may be a stream that one process reads for all.

    Raises:
        InputError: on every rank, where the loader gives all ranks the same: each batch would be trained on P times.
    """

    def __init__(self, loader: Any, sharing: Sharing) -> None:
        self._loader, self._sharing, self._group = loader, sharing, sharing.group
        self._divided, self._alike = False, 0  # whether the ranks' batches differ, and which one did not

    def _compare(self, load: Callable[[], Any]) -> None:
        """Raise at the second batch that is the same on all ranks; a single one may be all the data that there is."""
        everyone = collectives.integers_of_all([_digest(load)], self._group)
        (digest,) = everyone[self._group.rank]
        if any(other != [digest] for other in everyone):
            self._divided = True
        elif digest and self._alike not in (0, digest):
            raise InputError(
                "get_train_dataloader",
                expected="a loader that divides the data by rank, because the trainer did not have it prepared by "
                "accelerate",
                found=f"{type(self._loader).__name__}, which gave all {self._group.size} ranks of the group the same "
                "two batches",
                remedy="return triton_sp.share_batches(loader, group) from it; otherwise each batch is trained on "
                f"{self._group.size} times",
                rank=self._group.rank,
            )
        self._alike = digest or self._alike

    def __len__(self) -> int:
        return len(self._loader) * self._group.size

    def __iter__(self) -> Iterator[Any]:
        own = iter(self._loader)
        while True:
            load = _loaded(own)
            if not self._divided:
                self._compare(load)
            for source in range(self._group.size):
                batch = from_source(load, source, self._sharing)
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


def _digest(load: Callable[[], Any]) -> int:
    """Of a batch's description and bytes; 0 if there is no batch, or one that cannot be sent."""
    tensors: list[Tensor] = []
    try:
        text = json.dumps(describe(load(), tensors, "batch"))
    except Exception:  # raised again when the batch is sent
        return 0
    digest = hashlib.blake2s(text.encode(), digest_size=8)
    digest.update(serialise(tensors).numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1 or 1
