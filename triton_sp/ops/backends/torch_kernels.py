"""What PyTorch ships: FlashAttention 2, by the operators of `torch.nn.attention.varlen`, and cuDNN's attention.

The operators are called as they are, below autograd. `torch.nn.attention.activate_flash_attention_impl("FA3")` puts
FlashAttention 3 behind the first of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from triton_sp.ops.backends.adapter import Adapter, Call, Direction, Results

_ops = torch.ops.aten


@functools.cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a random generator that is not used, as FlashAttention's backward takes it."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


class TorchFlash(Adapter):
    """FlashAttention 2 (arXiv:2307.08691) as PyTorch has it."""

    name = "torch"
    softcaps = False

    def absent(self) -> str:
        """It is in every PyTorch for GPUs."""
        return ""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """As `torch.nn.attention.varlen.varlen_attn` calls it."""
        (left, right), mask = call.reach, call.mask
        out, lse, *_ = _ops._flash_attention_forward(
            *(*call[:3], *mask.tables[:2], *call.max_seqlens, 0.0, (left, right) == (-1, 0), False),
            scale=call.softmax_scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(self, call: Call, results: Results, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """As the gradient of `varlen_attn` calls it; the operator allocates, so results are copied."""
        (left, right), mask, (dout, out, lse) = call.reach, call.mask, results
        found = _ops._flash_attention_backward(
            *(dout, *call[:3], out, lse, *mask.tables[:2], *call.max_seqlens, 0.0, (left, right) == (-1, 0)),
            *_no_dropout(call.q.device),
            scale=call.softmax_scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        for grad, x in zip(grads, found, strict=True):
            grad.copy_(x)


class Cudnn(Adapter):
    """cuDNN's attention as PyTorch's scaled_dot_product_attention runs it, on segments of one length.

    PyTorch can run it on ragged segments too, but that backward takes the head dim for the longest segment
    (`_cudnn_attention_backward` in attention_backward.cu, PyTorch 2.13), so ragged streams stay with ours.
    """

    name = "cudnn"
    largest = 128
    windows = False
    softcaps = False

    def absent(self) -> str:
        """It comes with PyTorch for NVIDIA GPUs."""
        return "this PyTorch is for AMD GPUs" if torch.version.hip is not None else ""

    def obstacle(self, direction: Direction, call: Call) -> str:
        """As of every adapter, and the segments must be of one length."""
        if found := super().obstacle(direction, call):
            return found
        rows, keys = call.max_seqlens
        equal = rows == keys and rows * self._segments(call) == len(call.q) == len(call.k)
        return "" if equal else f"{self.name} takes segments of one length"

    def _segments(self, call: Call) -> int:
        return call.mask.cu_seqlens_q.shape[0] - 1

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(T, H, D) seen as (segments, H, rows, D)."""
        q, k, v = (self._dense(x, call) for x in call[:3])
        out, lse, *_ = _ops._scaled_dot_product_cudnn_attention(
            *(q, k, v, None, True, 0.0, call.mask.causal, False), scale=call.softmax_scale
        )
        return out.transpose(1, 2).flatten(0, 1), lse.flatten(2).transpose(0, 1).flatten(1)

    def backward(self, call: Call, results: Results, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """The operator allocates, so results are copied."""
        q, k, v, dout, out = (self._dense(x, call) for x in (*call[:3], *results[:2]))
        lse = results.lse.unflatten(1, (self._segments(call), -1)).transpose(0, 1).unsqueeze(-1).contiguous()
        rows, seed = q.shape[2], torch.zeros((), dtype=torch.int64)
        found = _ops._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, lse, seed, seed, None, None, None, rows, rows, 0.0, call.mask.causal),
            scale=call.softmax_scale,
        )
        for grad, x in zip(grads, found, strict=True):
            self._dense(grad, call).copy_(x)

    def _dense(self, x: Tensor, call: Call) -> Tensor:
        return x.unflatten(0, (self._segments(call), -1)).transpose(1, 2)
