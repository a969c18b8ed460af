"""What an implementation of attention from elsewhere must be able to do, and say, to take the place of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask

Direction = Literal["forward", "backward"]


class Call(NamedTuple):
    """A call of the stage attend: q (T, H, D), k (T_k, K, D) and v (T_k, K, V), what rows see, and the factors."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    softmax_scale: float
    softcap: float
    sinks: Tensor | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """FlashAttention's `window_size`: how many keys behind and ahead of its own a row sees, -1 for all of them."""
        behind = -1 if self.mask.window is None else self.mask.window - 1
        return behind, 0 if self.mask.causal else behind

    @property
    def max_seqlens(self) -> tuple[int, int]:
        """Rows and keys of the longest segment, of a call that is taken."""
        assert self.mask.max_seqlens is not None
        return self.mask.max_seqlens


class Results(NamedTuple):
    """What the backward is given: the gradient of the output, the output (T, H, V) and the log-sum-exp (H, T)."""

    dout: Tensor
    out: Tensor
    lse: Tensor


class Adapter(ABC):
    """An implementation from elsewhere, in one or both directions.

    Both directions have our contract: the log-sum-exp is natural, (H, T) in fp32, so that one implementation may run
    the forward and another the backward. Nothing is read from the device.

    Attributes:
        name: as in `SPConfig.attention`.
        devices, dtypes: where it runs, and on what.
        largest: the largest head dim.
        windows, softcaps: whether it takes such calls.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    largest: ClassVar[int] = 256
    windows: ClassVar[bool] = True
    softcaps: ClassVar[bool] = True

    @abstractmethod
    def absent(self) -> str:
        """Why it cannot be used in this environment, or ""."""

    @abstractmethod
    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out (T, H, V) and the log-sum-exp (H, T), of a call that it takes."""

    @abstractmethod
    def backward(self, call: Call, results: Results, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """dq, dk and dv of a call that it takes, written to `grads`, which are dense along the head dim."""

    def obstacle(self, direction: Direction, call: Call) -> str:
        """Why it does not take a call, or "" where it does."""
        return next(self._obstacles(call), "")

    def _obstacles(self, call: Call) -> Iterator[str]:
        (q, k, v), mask, name = call[:3], call.mask, self.name
        if q.device.type not in self.devices:
            yield f"{name} runs on {' and '.join(self.devices)}, not on {q.device.type}"
        if q.dtype not in self.dtypes:
            yield f"{name} takes {' and '.join(map(str, self.dtypes))}, not {q.dtype}"
        if q.shape[2] != v.shape[2] or q.shape[2] % 8 or q.shape[2] > self.largest:
            yield f"{name} takes one head dim, a multiple of 8 up to {self.largest}, not {q.shape[2]} and {v.shape[2]}"
        if not q.numel() or not k.numel():
            yield f"{name} takes no empty tensors"
        yield from self._obstacles_of_mask(mask)
        if call.softcap and not self.softcaps:
            yield f"{name} takes no softcap"
        if call.sinks is not None:
            yield f"{name} takes no learned sinks"

    def _obstacles_of_mask(self, mask: Mask) -> Iterator[str]:
        name = self.name
        if mask.max_seqlens is None:
            yield f"{name} needs the length of the longest segment, which the host does not know"
        if mask.key_ranges is not None or mask.seqused_k is not None:
            yield f"{name} takes neither spans nor padded segments"
        if mask.cu_seqlens_q.dtype != torch.int32:
            yield f"{name} takes cu_seqlens in int32"
        if mask.window is not None and not self.windows:
            yield f"{name} takes no windows"
