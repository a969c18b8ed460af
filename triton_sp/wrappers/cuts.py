"""What a batch has in the place of pixels that were cut before they were sent, see pixels.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triton_sp.errors import InputError
from triton_sp.plan.shards import Shards

BY_IMAGES = "images"  # what is written where no plan has cut pixels


@dataclass(frozen=True)
class PixelCut:
    """How the pixels of a batch were cut, the same on every rank.

    Attributes:
        sizes: how many patches, or images, each rank has.
        plan: the name of the plan of the tower by which patches were cut, or "images".
        digest: of the pixels of the whole batch and the cut.
        why: why the rank that has cut them chose this plan, for `explain`.
    """

    sizes: tuple[int, ...]
    plan: str
    digest: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class PixelShard:
    """A rank's part of pixels. Its length and shape are those of the pixels of the whole batch.

    Attributes:
        rows: the part; patches are in the order in which the tower runs them.
    """

    rows: Tensor
    rank: int
    cut: PixelCut

    def __len__(self) -> int:
        return sum(self.cut.sizes)

    def __str__(self) -> str:
        return f"{self.cut.digest} {self.cut.plan} {len(self)}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return (len(self), *self.rows.shape[1:])

    @property
    def ndim(self) -> int:
        """The dimensions of the whole."""
        return self.rows.ndim

    def size(self, dim: int | None = None) -> Any:
        """`Tensor.size`, of the whole."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the whole."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's part is."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """The bytes of this rank's part."""
        return self.rows.nbytes

    def to(self, *args: Any, **kwargs: Any) -> PixelShard:
        """`Tensor.to`, of the part."""
        return replace(self, rows=self.rows.to(*args, **kwargs))

    def __getitem__(self, taken: slice) -> Tensor:
        """This rank's part, if it is that which is taken."""
        own = Shards(self.cut.sizes).range(self.rank)
        if (taken.start, taken.stop) != (own.start, own.stop):
            raise _cut_otherwise(f"rows {taken.start} to {taken.stop} on rank {self.rank}", str(own)[5:])
        return self.rows

    def expect(self, sizes: tuple[int, ...], plan: str) -> None:
        """Raise an InputError if the pixels were cut otherwise."""
        if (self.cut.sizes, self.cut.plan) != (sizes, plan):
            raise _cut_otherwise(f"pixels cut by the plan {plan}, {sizes}", f"by {self.cut.plan}, {self.cut.sizes}")


def _cut_otherwise(expected: str, found: str) -> InputError:
    remedy = "give share_batches the model that the batches are for, as it is wrapped now"
    return InputError("pixels", expected=expected, found=found, remedy=remedy)


def refuse_shards(arguments: Mapping[str, Any], why: str) -> None:
    """Raise an InputError for pixels of which this rank has a part, in a call that needs all."""
    for name, value in arguments.items():
        if isinstance(value, PixelShard):
            raise InputError(
                name,
                expected=f"all pixels: {why}",
                found="this rank's part of them",
                remedy="call share_batches without model for these batches",
            )
