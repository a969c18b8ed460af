"""Comparing implementations of attention with ours on this machine: first whether they are right, then how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask
from triton_sp.ops import attend_cpu, varlen
from triton_sp.ops.backends import choice
from triton_sp.ops.backends.adapter import Adapter, Call, Direction, Results
from triton_sp.ops.backends.verdict import Finding

DIMS = (64, 72, 80, 96, 128, 256)
ROUNDS = 15  # the median of these is taken
LONG = {"cuda": (4096, 4096), "cpu": (64, 64)}  # segments of the timed call
SHAPES = ((300, 1, 129, 64), (256, 256))  # segments of the calls that are compared


class Sample(NamedTuple):
    """A call, the gradient of its output, and what ours makes of the forward."""

    call: Call
    results: Results


def sample(dim: int, causal: bool, lengths: tuple[int, ...], device: torch.device) -> Sample:
    """A random call in bf16. Causal ones have the grouped heads of a decoder."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    mask = Mask(cu_seqlens, causal=causal, max_seqlens=(max(lengths), max(lengths)))
    q, k, v, dout = (
        torch.randn(sum(lengths), heads, dim, device=device, dtype=torch.bfloat16)
        for heads in (8, *[2 if causal else 8] * 2, 8)
    )
    call = Call(q, k, v, mask, dim**-0.5, 0.0)
    return Sample(call, Results(dout, *ours(call)))


def outcome(direction: Direction, sample: Sample, adapter: Adapter | None) -> list[Tensor]:
    """out, or dq, dk and dv, by an adapter or by ours."""
    call, results = sample
    if direction == "forward":
        return list(adapter.forward(call) if adapter else ours(call))
    grads = (torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v))
    if adapter:
        adapter.backward(call, results, grads)
        return list(grads)
    states = (*call[:3], results.out, results.lse)
    factors: Any = {"softmax_scale": call.softmax_scale, "softcap": call.softcap}
    varlen.backward(results.dout, None, states, call.mask, grads=grads, **factors)
    return list(grads)


def ours(call: Call) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp by ours."""
    q, k, v, mask, scale, softcap, sinks = call
    return varlen.forward(q, k, v, mask, softmax_scale=scale, softcap=softcap, sinks=sinks)


def difference(direction: Direction, sample: Sample, adapter: Adapter) -> str:
    """How an adapter differs from attention in fp32 by more than twice what ours does, or ""."""
    call, results = sample
    q, k, v = states = [x.float().requires_grad_() for x in (call.q, call.k, call.v)]
    out, lse = attend_cpu.attend_exactly(q, k, v, call.mask, softmax_scale=call.softmax_scale)
    exact = [out.detach(), lse.detach()]
    if direction == "backward":
        exact = list(torch.autograd.grad(out, states, results.dout.float()))
    for name, theirs, own, wanted in zip(
        ("out", "lse") if direction == "forward" else ("dq", "dk", "dv"),
        outcome(direction, sample, adapter),
        outcome(direction, sample, None),
        exact,
        strict=True,
    ):
        if theirs.shape != wanted.shape:
            return f"{name} has shape {tuple(theirs.shape)}, not {tuple(wanted.shape)}"
        error, usual = ((x.float() - wanted).abs().max().item() for x in (theirs, own))
        if not error <= 2 * usual + 1e-3:  # also where it is NaN
            return f"{name} differs from attention in fp32 by {error:.3g}, ours by {usual:.3g}"
    return ""


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of a call."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begin

    for _ in range(3):  # what is compiled or loaded at first
        once()
    return statistics.median(once() for _ in range(ROUNDS))


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare everything that can be used here, in every direction and head dim that it takes."""
    here = [adapter for adapter in choice.adapters().values() if device.type in adapter.devices]
    usable = [adapter for adapter in here if not adapter.absent()]
    for dim in DIMS if usable else ():
        for causal in (False, True):
            timed = sample(dim, causal, LONG[device.type], device)
            compared = [sample(dim, causal, lengths, device) for lengths in SHAPES]
            for adapter in usable:
                yield from _of(adapter, dim, causal, timed, compared, device)


def _of(
    adapter: Adapter, dim: int, causal: bool, timed: Sample, compared: list[Sample], device: torch.device
) -> Iterator[Finding]:
    for direction in ("forward", "backward"):
        taken = [x for x in compared if not adapter.obstacle(direction, x.call)]
        if not taken or adapter.obstacle(direction, timed.call):
            continue
        own = theirs = 0.0
        try:
            wrong = next(filter(None, (difference(direction, x, adapter) for x in taken)), "")
            if not wrong:
                own, theirs = (
                    seconds(lambda by=by, way=direction: outcome(way, timed, by), device) for by in (None, adapter)
                )
        except Exception as error:  # whatever a kernel from elsewhere may raise
            wrong = f"{type(error).__name__}: {error}"[:300]
        yield Finding(adapter.name, direction, dim, causal, wrong, own, theirs)
