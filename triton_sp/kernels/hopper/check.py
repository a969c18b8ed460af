"""The self-check of the Gluon tier, after that of the portable kernels: `python -m triton_sp.kernels.check`.

On the GPU at hand, against the portable kernel with a tolerance, and bit for bit against a variant that lets no product
run while something else does: it differs only in when it waits, so a difference is a race or a register taken too
early. The verdict is recorded (gate.py). It begins as "did not end", so a crash or a hang is a no as well.
"""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from triton_sp.kernels import verdict
from triton_sp.kernels.check import Case, tensors, try_cases
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.verdict import Verdict

REPEATS = 5  # of the bit-for-bit comparison: a race need not show at once
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # four roundings of the dtype, relative and absolute
RAGGED = [300, 0, 1, 129, 128, 64, 777, 1500]

Attend = Callable[..., tuple[Tensor, Tensor]]
Gradients = Callable[..., tuple[Tensor, Tensor, Tensor]]


def cases() -> Iterator[Case]:
    """Ragged segments with and without causality, grouped heads, fewer and more keys than rows, and long ones."""
    for dim in (64, 72, 80, 128):
        for dtype in (torch.bfloat16, torch.float16):
            yield Case(dim, 3, 3, False, "side by side", RAGGED, RAGGED, dtype=dtype)
            yield Case(dim, 3, 3, True, "side by side", RAGGED, RAGGED, dtype=dtype)
            yield Case(dim, 8, 2, True, "apart", RAGGED, RAGGED[::-1], dtype=dtype)
            yield Case(dim, 4, 1, False, "apart", RAGGED, [400, 9, 0, 1, 130, 640, 700, 0], dtype=dtype)
            yield Case(dim, 4, 2, True, "heads first", RAGGED, RAGGED, dtype=dtype)
        yield Case(dim, 16, 16, False, "side by side", [2048] * 4, [2048] * 4, poisoned=None)


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
    (*states, _), mask = tensors(case, device)
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
    (q, k, v, dout), mask = tensors(case, device)
    scale = case.dim**-0.5
    out, lse = forward(q, k, v, mask, softmax_scale=scale)
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

    def settled(case: Case) -> str:
        wrong = examined(case)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return wrong

    return try_cases(cases(), settled, "the portable kernel", lambda error: True)


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
