"""What a model keeps for the backward, in CPU memory: with gradient checkpointing, the hidden states of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from triton_sp.wrappers.install import Installation


@contextmanager
def kept_on_cpu(installation: Installation) -> Iterator[None]:
    """While a part of the model runs, what it keeps goes to the CPU, by torch's `save_on_cpu`; weights stay.

    A checkpointed layer keeps its input. What it keeps while it is recomputed stays where it is.
    """
    if not installation.config.offload or not torch.is_grad_enabled():
        yield
        return
    mover: Any = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(x: Tensor) -> Any:
        if not x.is_floating_point() or isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter):
            return x
        installation.offloaded += x.nbytes
        return mover.pack_hook(x)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else mover.unpack_hook(kept)

    with saved_tensors_hooks(pack, unpack):
        yield
