"""What travels from a layer to the launch of its kernels and back: what rows see of keys, and gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

States = tuple[Tensor, Tensor, Tensor]  # q, k and v of some heads, or places for their gradients
UNLIMITED = 1 << 30  # a reach that no segment exceeds, and that can be added to a position without overflow


class Mask(NamedTuple):
    """Which keys each row sees. Rows and keys are packed: segment after segment, without padding.

    Attributes:
        cu_seqlens_q: int32 or int64 (segments + 1,), on the device of q: where each segment of rows starts, and the end
            of the last. Equal neighbours are empty segments; rows past the last entry belong to none and see nothing.
        cu_seqlens_k: the same for keys; None if equal.
        seqused_k: int32 or int64 (segments,), how many keys of each segment count; None for all of them.
        key_ranges: int32 or int64 (2, T), the keys that each row sees: from key_ranges[0] up to, not including,
            key_ranges[1]; of these, the ones in its own segment. Both never decrease from row to row. They take the
            place of `causal` and `window`, for masks in which a block of tokens sees all of itself: the prefix of
            PaliGemma (arXiv:2407.07726), the images of Gemma 3 (arXiv:2503.19786).
        causal: a row sees the keys up to its own position; the last row is aligned with the last key that counts.
        window: a row sees this many keys, its own included, behind it (and ahead of it, if not causal).
        max_seqlens: rows and keys of the longest segment, if the host knows them. Our kernels do without, and take
            smaller tiles where they are told of short ones; those of others must be told. They also rely on segments
            that cover all rows, and on rows that each see a key.
        kept: where kernels keep what they have worked out of a mask, from call to call; only for a mask whose tensors
            never change. None: nothing is kept.

    >>> import torch
    >>> mask = Mask(torch.tensor([0, 2, 3]), causal=True, window=5)
    >>> mask.left, mask.right, mask.tables[1].tolist()
    (4, 0, [0, 2, 3])
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    key_ranges: Tensor | None = None
    causal: bool = False
    window: int | None = None
    max_seqlens: tuple[int, int] | None = None
    kept: dict[tuple[str, int], Tensor] | None = None

    @property
    def left(self) -> int:
        """How many keys behind its own position a row sees."""
        return UNLIMITED if self.window is None else self.window - 1

    @property
    def right(self) -> int:
        """How many keys ahead of its own position a row sees."""
        return 0 if self.causal else self.left

    @property
    def longest(self) -> int | None:
        """The longest segment, if the host knows it."""
        return None if self.max_seqlens is None else max(self.max_seqlens)

    @property
    def ordered(self) -> int:
        """1 where later rows see more keys, 0 where a row's number says nothing about it."""
        return int(self.causal or self.key_ranges is not None)

    @property
    def tables(self) -> list[Tensor | None]:
        """The four tensors, with the table of the keys filled in."""
        cu_seqlens_k = self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        return [self.cu_seqlens_q, cu_seqlens_k, self.seqused_k, self.key_ranges]


class Grads(NamedTuple):
    """What a backward of attention gives: dq, dk and dv, like q, k and v, and the gradient of the sinks, (H,) in fp32
    or wider, where there are any."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None


class Norm(NamedTuple):
    """RMS norms of the heads of q and k, see `ops.reference.normalise`.

    Attributes:
        weights: (D,), that of q and that of k.
        eps, offset: numbers of x / sqrt(mean(x^2) + eps) * (offset + weight).
        rows: q and k as they were before, (T, heads, D), for the adjoint.
    """

    weights: tuple[Tensor, Tensor]
    eps: float
    offset: float = 0.0
    rows: tuple[Tensor, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether the weights have gradients."""
        return any(weight.requires_grad for weight in self.weights)


class Rotation(NamedTuple):
    """What q and k go through where they are packed: rotary embeddings by the positions of their rows, see
    `ops.reference.turn`, and before that an RMS norm, where they have one.

    Attributes:
        cos, sin: (T, d), for the first d of the numbers of each head.
        back: the adjoint instead.
    """

    cos: Tensor
    sin: Tensor
    back: bool = False
    norm: Norm | None = None

    def rows(self, count: int) -> Rotation:
        """That of the first rows."""
        return self if len(self.cos) == count else self._replace(cos=self.cos[:count], sin=self.sin[:count])

    @property
    def adjoint(self) -> Rotation:
        """What the gradients of rotated rows go through."""
        return self._replace(back=not self.back)

    def of(self, q: Tensor, k: Tensor, *weights: Tensor) -> Rotation:
        """The one whose adjoint can be taken: it knows q and k, and the weights, where they are normalised."""
        return self if self.norm is None else self._replace(norm=Norm(weights, *self.norm[1:3], rows=(q, k)))  # type: ignore[arg-type]
