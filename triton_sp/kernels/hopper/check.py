"""The self-check of the Gluon tier, after that of the portable kernels: `python -m triton_sp.kernels.check`.

On the GPU at hand, against the portable kernel with a tolerance, and bit for bit against a variant that lets no product
run while something else does: it differs only in when it waits, so a difference is a race or a register taken too
early. The verdict is recorded (gate.py). It begins as "did not end", so a crash or a hang is a no as well.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_sp.kernels import verdict
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.verdict import Verdict

REPEATS = 5  # of the bit-for-bit comparison: a race need not show at once
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # four roundings of the dtype, relative and absolute
RAGGED = [300, 0, 1, 129, 128, 64, 777, 1500]

Attend = Callable[..., tuple[Tensor, Tensor]]
Gradients = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Case(NamedTuple):
    """One call; `k` is None where keys are of the same lengths, and q, k, v then lie interleaved in one buffer. With
    `heads_first` the heads lie before the tokens, as in a layer that attends on its own rank."""

    dim: int
    dtype: torch.dtype
    q: list[int]
    k: list[int] | None
    heads: int
    k_heads: int
    causal: bool
    heads_first: bool = False


def cases() -> Iterator[Case]:
    """Ragged segments with and without causality, grouped heads, fewer and more keys than rows, and long ones."""
    for dim in (64, 72, 80, 128):
        for dtype in (torch.bfloat16, torch.float16):
            yield Case(dim, dtype, RAGGED, None, 3, 3, False)
            yield Case(dim, dtype, RAGGED, None, 3, 3, True)
            yield Case(dim, dtype, RAGGED, RAGGED[::-1], 8, 2, True)
            yield Case(dim, dtype, RAGGED, [400, 9, 0, 1, 130, 640, 700, 0], 4, 1, False)
            yield Case(dim, dtype, RAGGED, RAGGED, 4, 2, True, heads_first=True)
        yield Case(dim, torch.bfloat16, [2048] * 4, None, 16, 16, False)


def tensors(case: Case, device: torch.device) -> tuple[list[Tensor], Mask]:
    """q, k, v with NaN in a whole segment and in 5 rows past the last, and the mask."""
    torch.manual_seed(0)
    lengths = case.q if case.k is None else case.k
    tables = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (case.q, lengths)]
    if case.k is None:
        found = list(torch.randn(sum(case.q) + 5, 3, case.heads, case.dim, device=device, dtype=case.dtype).unbind(1))
    else:
        sizes = [(sum(case.q) + 5, case.heads), *[(sum(lengths) + 5, case.k_heads)] * 2]
        found = [torch.randn(*size, case.dim, device=device, dtype=case.dtype) for size in sizes]
        if case.heads_first:
            found = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in found]
    for x, n in zip(found, (case.q, lengths, lengths), strict=True):
        x[sum(n) :] = torch.nan
        if len(n) == len(RAGGED):
            x[sum(n[:4]) : sum(n[:5])] = torch.nan  # of which neighbours must see nothing
    return found, Mask(*tables, causal=case.causal)


def difference(case: Case, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> str:
    """How out and log-sum-exp differ by more than the tolerance, or ""."""
    for name, ours, theirs, limit in zip(("out", "lse"), found, wanted, (TOLERANCE[case.dtype], 1e-4), strict=True):
        close = torch.isclose(ours.float(), theirs.float(), rtol=limit, atol=limit, equal_nan=True)
        if not close.all():
            most = (ours.float() - theirs.float()).abs().nan_to_num(torch.inf).max()
            return f"{name} differs from the portable kernel's in {int((~close).sum())} places, by up to {most:.3g}"
    return ""


def examine(case: Case, device: torch.device, gluon: Attend, portable: Attend) -> str:
    """What is wrong with one case, or ""."""
    states, mask = tensors(case, device)
    scale = case.dim**-0.5
    found = gluon(*states, mask, softmax_scale=scale)
    wanted = portable(*states, mask, softmax_scale=scale)
    if wrong := difference(case, found, wanted):
        return wrong
    waited = gluon(*states, mask, softmax_scale=scale, wait=True)
    for _ in range(REPEATS):
        for name, ours, theirs in zip(("out", "lse"), gluon(*states, mask, softmax_scale=scale), waited, strict=True):
            # As integers: NaN is not equal to itself.
            integer = torch.int16 if ours.element_size() == 2 else torch.int32
            if not torch.equal(ours.view(integer), theirs.view(integer)):
                return f"{name} is not equal bit for bit to that of the variant that waits"
    return ""


def examine_backward(case: Case, device: torch.device, forward: Attend, gluon: Gradients, portable: Gradients) -> str:
    """The same of the backward, whose sums are in no fixed order: against the portable kernels only, several times."""
    (q, k, v), mask = tensors(case, device)
    scale = case.dim**-0.5
    out, lse = forward(q, k, v, mask, softmax_scale=scale)
    dout = torch.randn_like(out)
    wanted = portable(dout, None, q, k, v, out, lse, mask, softmax_scale=scale)
    for _ in range(REPEATS):
        found = gluon(dout, None, q, k, v, out, lse, mask, softmax_scale=scale)
        for name, ours, theirs in zip(("dq", "dk", "dv"), found[:3], wanted[:3], strict=True):
            if not torch.equal(ours.isnan(), theirs.isnan()):
                return f"{name} is NaN in other places than the portable kernel's"
            error, size = ((x.nan_to_num().float()).abs() for x in (ours.float() - theirs.float(), theirs))
            if bool(error.max() > TOLERANCE[case.dtype] * size.max()) or bool(
                error.mean() > TOLERANCE[case.dtype] * size.mean()
            ):
                return f"{name} differs from the portable kernel's by up to {float(error.max()):.3g}"
    return ""


def check(device: torch.device, examined: Callable[[Case], str]) -> Verdict:
    """All cases; the first that is wrong, or any exception, is the verdict's reason."""
    begin, count = time.monotonic(), 0
    for case in cases():
        try:
            wrong = examined(case)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # whatever a compiler, a driver or a kernel may raise
            wrong = f"{type(error).__name__}: {error}"[:500]
        if wrong:
            return Verdict(False, f"{wrong} ({case})", time.monotonic() - begin)
        count += 1
    return Verdict(True, f"{count} cases agree with the portable kernel", time.monotonic() - begin)


def examination(kind: str, device: torch.device) -> Callable[[Case], str]:
    """What is looked at in each case, for one direction, with the kernels themselves."""
    names = ("attend", "attend_backward", "hopper.attend", "hopper.backward")
    attend, attend_backward, hopper, backward = (importlib.import_module(f"triton_sp.kernels.{name}") for name in names)
    if kind == gate.FORWARD:
        return lambda case: examine(case, device, hopper.forward, attend.forward)
    return lambda case: examine_backward(case, device, attend.forward, backward.backward, attend_backward.backward)


def run(index: int = 0, kind: str = gate.FORWARD) -> Verdict:
    """Checks one direction on GPU number `index` and records the verdict, which holds for processes that start
    afterwards."""
    if reason := gate.obstacle(index):
        return Verdict(False, reason)
    where, device = gate.machine(index), torch.device("cuda", index)
    verdict.write(kind, where, Verdict(False, "the self-check began and did not end"))
    try:
        found = check(device, examination(kind, device))
    except Exception as error:  # as above: of the import
        found = Verdict(False, f"{type(error).__name__}: {error}"[:500])
    verdict.write(kind, where, found)
    gate.known.cache_clear()
    return found
