"""Every rank of a group gets the same batches, and each rank loads only every P-th of them.

The ranks take turns: rank i % P reads and decodes the batch of step i, and sends it to the others as a description in
JSON and the bytes of its tensors. Nothing is pickled, so a rank cannot be made to run code. Sizes are compared with a
limit before memory is taken for them. Pixels may be cut where they were loaded: then each rank is sent its own part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from triton_sp.engines.wire import DTYPES, describe, deserialise, rebuild, room, serialise
from triton_sp.errors import DisagreementError, InputError
from triton_sp.ranks import collectives
from triton_sp.ranks.agreement import agree
from triton_sp.ranks.failures import text_of
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.cuts import PixelCut, PixelShard

_BATCH, _END, _FAILED = range(3)  # what the rank has whose turn it is
NONE = object()  # stands for a batch where there is none
_DESCRIPTION_LIMIT = 1 << 22  # bytes of JSON
# The options of a DataLoader besides its dataset and its sampler.
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
    *("generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order"),
)


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a group share batches.

    Attributes:
        limit: the most bytes that a rank takes for a batch.
        cut: the pixels of a batch of which each rank is sent a part, by name: the rows of all ranks, and how they are
            cut. None if batches are sent whole.
    """

    group: Group
    limit: int
    cut: Callable[[Any], dict[str, tuple[Tensor, PixelCut]]] | None = None


class _Turns:
    """Every P-th of the batches of a sampler, from this rank's number on."""

    def __init__(self, batches: Any, group: Group) -> None:
        self.batches, self.group = batches, group

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.group.rank, None, self.group.size)

    def __len__(self) -> int:
        return len(range(self.group.rank, len(self.batches), self.group.size))


class SharedBatches(DataLoader[Any]):
    """A DataLoader whose batches every rank of a group gets; see `loaders.share_batches`."""

    def __init__(self, loader: DataLoader[Any], sharing: Sharing) -> None:
        group = sharing.group
        options = {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}
        streamed = isinstance(loader.dataset, IterableDataset)
        self.sharing = sharing
        super().__init__(**self.outer(loader, options))
        turns: dict[str, Any] = self._sampled(loader)
        turns |= {name: _Turns(sampler, group) for name, sampler in turns.items() if name.endswith("sampler")}
        # To take turns in a stream, each rank would have to read all of it: the first rank reads it for the others.
        self._parts = None if streamed and group.rank else DataLoader(loader.dataset, **turns, **options)
        self._streamed = streamed

    @staticmethod
    def _sampled(loader: DataLoader[Any]) -> dict[str, Any]:
        """Which samples a loader takes together."""
        streamed = isinstance(loader.dataset, IterableDataset)
        if not streamed and loader.batch_sampler is not None:
            return {"batch_sampler": loader.batch_sampler}
        sampled = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return sampled if streamed else sampled | {"sampler": loader.sampler}  # which makes the batches

    def outer(self, loader: DataLoader[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the loader that others see."""
        return options | {"dataset": loader.dataset} | self._sampled(loader)

    def __iter__(self) -> Any:
        sharing, streamed = self.sharing, self._streamed
        told = f"streamed={streamed}\nlimit={sharing.limit}\npixels are cut={sharing.cut is not None}"
        agree(sharing.group, lambda: told, step="reading shared batches")
        own = iter(()) if self._parts is None else iter(self._parts)
        for step in count():
            batch = from_source(lambda: next(own), 0 if streamed else step % sharing.group.size, sharing)
            if batch is NONE:
                return
            yield batch


def from_source(load: Callable[[], Any], source: int, sharing: Sharing) -> Any:
    """The batch that `load` returns on rank `source`, on every rank; `NONE` if there is none left."""
    group, cut = sharing.group, dict[str, tuple[Tensor, PixelCut]]()
    kind, text, tensors, failure = _END, b"", [], None
    if group.rank == source:
        try:
            batch = load()
            if sharing.cut is not None:
                cut = sharing.cut(batch)
                batch = {**batch, **dict.fromkeys(cut)}
            told = {name: _describe_cut(rows, how) for name, (rows, how) in cut.items()}
            text, kind = json.dumps([describe(batch, tensors, "batch"), told]).encode(), _BATCH
            _check_size(len(text), sum(map(room, tensors)) + _cut_bytes(told), sharing.limit)
        except StopIteration:
            pass
        except Exception as error:
            kind, text, tensors, failure = _FAILED, text_of(error).encode()[:_DESCRIPTION_LIMIT], [], error
    head = torch.tensor([kind, len(text), sum(map(room, tensors))])
    kind, length, size = collectives.broadcast(head, source, group).tolist()
    if kind == _END:
        return NONE
    _check_size(length, size, sharing.limit)
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(length, dtype=torch.uint8)
    text = bytes(collectives.broadcast(own, source, group).tolist())
    if failure is not None:
        raise failure
    if kind == _FAILED:
        raise DisagreementError(
            "batch",
            expected=f"a batch from rank {source}, whose turn it is",
            found=f"an error in reading it there: {text.decode(errors='replace')}",
            remedy="see that rank's error",
            rank=group.rank,
        )
    payload = collectives.broadcast(
        serialise(tensors) if tensors else torch.empty(size, dtype=torch.uint8), source, group
    )
    sent = iter(tensors)
    described, told = json.loads(text)
    _check_size(length, size + _cut_bytes(told), sharing.limit)
    batch = rebuild(described, (lambda *_: next(sent)) if group.rank == source else deserialise(payload))
    for name, told_of_one in told.items():
        batch[name] = _deal(cut[name][0] if name in cut else None, told_of_one, source, group)
    return batch


def _describe_cut(rows: Tensor, cut: PixelCut) -> list[Any]:
    """Pixels of which each rank is sent a part, as JSON."""
    return [str(rows.dtype)[6:], list(rows.shape[1:]), list(astuple(cut))]


def _cut_bytes(told: dict[str, Any]) -> int:
    """The bytes of all parts."""
    return sum(sum(cut[0]) * math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape, cut in told.values())


def _deal(whole: Tensor | None, told: list[Any], source: int, group: Group) -> PixelShard:
    """This rank's part of the pixels that rank `source` has whole."""
    dtype, shape, (sizes, *more) = told
    if whole is None:
        rows = torch.empty(0, math.prod(shape) * DTYPES[dtype].itemsize, dtype=torch.uint8)
    else:
        rows = whole.flatten(1).contiguous().view(torch.uint8)
    own = collectives.deal(rows, sizes, source, group).view(DTYPES[dtype]).view(sizes[group.rank], *shape)
    return PixelShard(own, group.rank, PixelCut(tuple(sizes), *more))


def _check_size(description: int, tensors: int, limit: int) -> None:
    if description > _DESCRIPTION_LIMIT or not 0 <= tensors <= limit:
        raise InputError(
            "batch",
            expected=f"up to {limit} bytes of tensors, and {_DESCRIPTION_LIMIT} of text and numbers",
            found=f"{tensors} and {description} bytes",
            remedy="make smaller batches, or raise the limit of share_batches",
        )
