"""The hidden states around a stack of blocks as one stream of tokens, and back in the shape that the model has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.segments import Segments


@dataclass
class HiddenShape:
    """The shape of a tower's hidden states before its first block.

    They are packed, (T, C) or (1, T, C), or have N tokens for each of B images: (B, N, C), or (N, B, C) if
    `tokens_first`. The stream has the tokens of one image after those of another.

    Images that are padded to one size come with a mask: padding attends to its image, but nothing attends to padding.
    In the stream the real tokens of each image come first then, so that the keys of a segment are a range.

    Attributes:
        shape: that of the hidden states.
        real: (B, N) bool, the tokens that are not padding; None if none is padding.

    >>> images = HiddenShape(torch.Size((2, 3, 8)), torch.device("cpu"))
    >>> images.flat(torch.zeros(2, 3, 8)).shape, images.local(torch.zeros(4, 8)).shape, images.segments().starts
    (torch.Size([6, 8]), torch.Size([1, 4, 8]), (0, 3, 6))
    """

    shape: torch.Size
    device: torch.device
    tokens_first: bool = False
    real: Tensor | None = None

    @cached_property
    def order(self) -> Tensor | None:
        """(B N,) int64, which token of the images each token of the stream is; None if it is the same one."""
        if self.real is None:
            return None
        first = torch.arange(0, self.tokens, self.length, device=self.device)[:, None]
        return (first + (~self.real).int().argsort(dim=1, stable=True)).flatten()

    @property
    def tokens(self) -> int:
        """All tokens, padding too."""
        return self.shape[:-1].numel()

    @property
    def length(self) -> int:
        """Tokens of an image; of the whole stream if it is packed."""
        return self.shape[0 if self.tokens_first else -2]

    @cached_property
    def used(self) -> Tensor | None:
        """(B,) int32, how many tokens of each image are real, where any is padding."""
        return None if self.real is None else self.real.sum(1, dtype=torch.int32)

    def segments(self) -> Segments:
        """One segment for each image; a packed tower gives each block its cu_seqlens instead."""
        return Segments(tuple(range(0, self.tokens + 1, max(self.length, 1))))

    def flat(self, hidden: Tensor) -> Tensor:
        """The stream (S, C) of all tokens, from the hidden states around the blocks."""
        tokens_SC = (hidden.transpose(0, 1) if self.tokens_first else hidden).flatten(0, -2)
        return tokens_SC if self.order is None else tokens_SC[self.order]

    def restore(self, tokens_SC: Tensor) -> Tensor:
        """The inverse of `flat`."""
        if self.order is not None:
            tokens_SC = tokens_SC[self.order.argsort()]
        if self.tokens_first:
            return tokens_SC.unflatten(0, self.shape[1::-1]).transpose(0, 1)
        return tokens_SC.unflatten(0, self.shape[:-1])

    def local(self, tokens_TC: Tensor) -> Tensor:
        """A rank's tokens (T, C) in the shape that blocks take: like one image."""
        if len(self.shape) == 2:
            return tokens_TC
        return tokens_TC[:, None] if self.tokens_first else tokens_TC[None]

    def rows(self, local: Tensor) -> Tensor:
        """The inverse of `local`."""
        return local.flatten(0, -2)


@dataclass(frozen=True)
class SequencesShape:
    """Hidden states (B, N, C) of sequences that are cut at the same places: row n of the stream (N, B, C) has token n
    of every sequence. The same methods as HiddenShape.

    >>> SequencesShape(torch.Size((2, 3, 8))).flat(torch.zeros(2, 3, 8)).shape
    torch.Size([3, 2, 8])
    """

    shape: torch.Size

    def flat(self, hidden: Tensor) -> Tensor:
        """(B, N, C) to (N, B, C); its own inverse, and the same for all tokens as for a rank's."""
        return hidden.transpose(0, 1)

    restore = local = rows = flat


def real_tokens(mask: Tensor, hidden: Tensor, block: str) -> Tensor | None:
    """(B, N) bool, the tokens that a block's mask lets all others attend to; None if these are all.

    Args:
        mask: (B, N), non-zero at real tokens; or (B, 1, N or 1, N), bool or added to scores, the same for all rows.
        hidden: (B, N, C), what the block gets.
        block: its name, for errors.

    Raises:
        UnsupportedModelError: a mask of another kind.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.ndim == 2:
        seen = mask.bool()[:, None, None]
    shape = (*hidden.shape[:1], 1, hidden.shape[1]) if hidden.ndim == 3 else ()
    if seen.ndim != 4 or (seen.shape[0], seen.shape[1], seen.shape[3]) != shape or bool((seen != seen[:, :, :1]).any()):
        raise UnsupportedModelError(
            block,
            expected="a mask of padded patches that is the same for all patches of an image",
            found=f"one of shape {tuple(mask.shape)}",
            remedy="this kind of mask is not handled; call without it",
        )
    real = seen[:, 0, 0]
    return None if bool(real.all()) else real
