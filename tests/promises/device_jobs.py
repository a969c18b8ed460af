"""The jobs of test_device.py, for ranks whose tensors are on a device that is not the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from kit import device, parity, tiny, zoo
from torch import Tensor

import triton_sp
from triton_sp.kernels import launch
from triton_sp.ops import dispatch, varlen
from triton_sp.ranks import collectives


class Found(NamedTuple):
    """How far gradients are from one process's on the CPU, who has read from the device in the last step, and what
    `explain` tells of the ranks' messages."""

    error: float
    worst: str
    forward: dict[str, int]
    backward: dict[str, int]
    told: str


def step(name: str, checkpointing: str = "none", launched: bool = False, **options: Any) -> Found:
    """The second step of a wrapped model, whose first one finds out who rotates.

    Args:
        launched: kernels are launched, as on a GPU, on a stub that looks where their arguments are; else what stands
            for them on the CPU computes their results.
    """
    device.register()
    case = replace(zoo.CASES[name], dtype=torch.float32, widened=False) if launched else zoo.CASES[name]
    batch_name = "image_and_video" if "image_and_video" in case.batches else next(iter(case.batches))
    with parity.in_dtype_of(case), messages_by_device(), launches_on_a_stub() if launched else nullcontext():
        batch = case.batch(batch_name)
        expected = parity.gradients(case.model()) if launched else reference_step(case, batch_name)
        model = device.place(case.model())
        parity.set_checkpointing(model, checkpointing)
        triton_sp.wrap(model, config=parity.heads(2, **options))
        there = {key: x.to(device.KIND) for key, x in batch.items()}
        for _ in range(2):
            model.zero_grad()
            device.begin()
            loss = parity.loss_of(model(**there), None)
            forward = dict(device.reads)
            device.reads.clear()
            loss.backward()
        backward = dict(device.reads)
        triton_sp.sync_gradients(model)
        told = triton_sp.explain(model).messages
        found = {name: getattr(grad, "held", grad) for name, grad in parity.gradients(model).items()}
    return Found(*parity.gradient_error(found, expected), forward, backward, told)


def reference_step(case: tiny.Case, batch_name: str) -> dict[str, Tensor]:
    """The gradients of one process on the CPU."""
    model, batch = case.model(), case.batch(batch_name)
    return (parity.exact_step if "labels" in batch else parity.step)(model, batch)[1]


@contextmanager
def messages_by_device() -> Iterator[None]:
    """Short messages of the host travel by the device, as in a group that has NCCL only."""
    with mock.patch.object(collectives, "control_device", lambda group: torch.device(device.KIND)):
        yield


@contextmanager
def launches_on_a_stub() -> Iterator[None]:
    """Every kernel is launched on a stub, which computes nothing."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        strays = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.device.type != device.KIND]
        assert not strays, f"{kernel.fn.__name__} is given tensors on the CPU: {strays}"

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "target", lambda: "cuda:90"),
        mock.patch.object(launch, "_check_dims", lambda *_: None),  # models this small have head dims of 8
        mock.patch.object(dispatch, "portable", lambda device: "triton"),
        mock.patch.object(dispatch, "implementation", lambda device: "triton"),
        mock.patch.object(varlen, "check_values", lambda *_: None),  # on a GPU nobody looks at them
    ):
        yield
