"""The self-check of the attention kernels: are they right on this GPU, with this Triton, driver and assembler?

Kernels that pass every test elsewhere have come out wrong from one release of an assembler, without a word. So before
the first attention on a GPU these cases are compared with the textbook in float64, once a machine: the verdict is kept
(verdict.py), and later processes only read it. Where the kernels are wrong every call raises, with the remedy.
`python -m triton_sp.kernels.check` runs it at once, and after it the self-check of the Hopper tier.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sp.errors import UnsupportedKernelError
from triton_sp.kernels import verdict
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.verdict import Verdict

KIND = "portable"
SOURCES = ("attend.py", "attend_backward.py", "check.py", "launch.py", "mask.py", "schedule.py", "sinks.py", "tiles.py")
SLACK = 5  # rows past the last segment, of NaN
ALLOWED = {"out": 2.0, "lse": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}  # times the textbook's error in the same dtype
REMEDY = (
    "let Triton use another ptxas (TRITON_PTXAS_PATH=/path/to/ptxas, from Triton 3.9 on TRITON_PTXAS_BLACKWELL_PATH; "
    "release 13.1 or newer) or install another Triton, and the check runs again by itself; or attend with other "
    'kernels: SPConfig(attention="torch")'
)
_known: dict[int, Verdict] = {}  # by the number of the GPU


class Case(NamedTuple):
    """One call, forward and backward; `poisoned` is the number of a segment that is all NaN.

    Layouts: "side by side" as in an exchange's buffer, where the heads of q, k and v lie in one tensor (of as many rows
    as keys); "heads first" as in a layer that attends on its own rank, where they lie before the tokens; "apart".
    """

    dim: int
    heads: int
    k_heads: int
    causal: bool
    layout: str
    q: Sequence[int] = (300, 0, 1, 129, 128, 64, 517)
    k: Sequence[int] = (300, 0, 1, 129, 128, 64, 517)
    window: int | None = None
    poisoned: int | None = 4
    dtype: torch.dtype = torch.bfloat16


def cases() -> Iterator[Case]:
    """Towers' and language models' head dims, in the layouts that a wrapped model has."""
    for dim in (64, 72, 80, 128):
        yield Case(dim, 3, 3, False, "side by side")
        yield Case(dim, 4, 1, True, "heads first")
    yield Case(128, 4, 2, True, "heads first", (40, 300, 8), (300, 129, 8), window=100, poisoned=2)


def tensors(case: Case, device: torch.device) -> tuple[list[Tensor], Mask]:
    """q, k, v and the gradient of out, and the mask."""
    generator = torch.Generator(device).manual_seed(0)  # of its own: the program's random numbers stay as they are

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    rows, keys = sum(case.q) + SLACK, sum(case.k) + SLACK
    if case.layout == "side by side":
        q, k, v = new(rows, case.heads + 2 * case.k_heads, case.dim).split((case.heads, case.k_heads, case.k_heads), 1)
        dout = new(rows, case.heads, case.dim)
    else:
        sizes = ((case.heads, rows), (case.k_heads, keys), (case.k_heads, keys), (case.heads, rows))
        q, k, v, dout = (new(*size, case.dim).transpose(0, 1) for size in sizes)
        if case.layout == "apart":
            q, k, v, dout = (x.contiguous() for x in (q, k, v, dout))
    for x, lengths in ((q, case.q), (k, case.k), (v, case.k), (dout, case.q)):
        x[poisoned(case, lengths)] = torch.nan
        x[sum(lengths) :] = torch.nan
    tables = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (case.q, case.k)]
    return [q, k, v, dout], Mask(*tables, causal=case.causal, window=case.window)


def poisoned(case: Case, lengths: Sequence[int]) -> slice:
    """The tokens of the segment that is all NaN."""
    if case.poisoned is None:
        return slice(0)
    start = sum(lengths[: case.poisoned])
    return slice(start, start + lengths[case.poisoned])


def textbook(case: Case, states: list[Tensor], mask: Mask, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both results and all gradients in `dtype`, segment by segment. Where a row sees nothing, and in the poisoned
    segment, they are 0, and the log-sum-exp -inf."""
    q, k, v, dout = (x.to(dtype) for x in states)
    found = {name: torch.zeros(x.shape, dtype=dtype, device=q.device) for name, x in zip(
        ("out", "dq", "dk", "dv"), (q, q, k, v), strict=True)}  # fmt: skip
    found["lse"] = torch.full(q.shape[1::-1], -torch.inf, dtype=dtype, device=q.device)
    scale, group = case.dim**-0.5, case.heads // case.k_heads
    for number, (n, n_k) in enumerate(zip(case.q, case.k, strict=True)):
        if number == case.poisoned or not n or not n_k:
            continue
        rows, keys = (slice(sum(x[:number]), sum(x[: number + 1])) for x in (case.q, case.k))
        ahead = torch.arange(n_k, device=q.device) - torch.arange(n_k - n, n_k, device=q.device)[:, None]
        q_, dout_ = (x[rows].transpose(0, 1) for x in (q, dout))
        k_, v_ = (x[keys].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        s = (q_ @ k_.mT * scale).masked_fill((ahead > mask.right) | (ahead < -mask.left), -torch.inf)
        lse = s.logsumexp(-1)
        p = (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        out = p @ v_
        ds = p * (dout_ @ v_.mT - (dout_ * out).sum(-1, keepdim=True)) * scale
        found["lse"][:, rows] = lse
        for name, part, x in (("out", rows, out), ("dq", rows, ds @ k_)):
            found[name][part] = x.transpose(0, 1)
        for name, x in (("dk", ds.mT @ q_), ("dv", p.mT @ dout_)):
            found[name][keys] = x.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return found


def examine(case: Case, states: list[Tensor], mask: Mask, found: dict[str, Tensor]) -> str:
    """What is wrong with the results of one case, or ""."""
    exact, plain = (textbook(case, states, mask, dtype) for dtype in (torch.float64, states[0].dtype))
    for name, factor in ALLOWED.items():
        ours, wanted, usual = (x[name].double() for x in (found, exact, plain))
        if name == "lse":
            ours, wanted, usual = ours.mT, wanted.mT, usual.mT
        lengths = case.k if name in ("dk", "dv") else case.q
        looked_at = torch.ones(len(ours), dtype=torch.bool, device=ours.device)
        looked_at[poisoned(case, lengths)] = False
        error, allowed = (torch.where(x == wanted, 0.0, (x - wanted).abs()) for x in (ours, usual))
        error = error.nan_to_num(torch.inf)[looked_at]
        limit = factor * float(allowed.max()) + 1e-4
        if bool((error > limit).any()):
            places = int((error > limit).sum())
            return f"{name} is off by up to {float(error.max()):.3g} in {places} places, where {limit:.2g} is usual"
    return ""


def try_cases(
    cases: Iterable[Case], examined: Callable[[Case], str], agree_with: str, is_result: Callable[[Exception], bool]
) -> Verdict:
    """All cases, by what `examined` says is wrong with each; the first that is wrong is the reason. An exception is a
    no where it `is_result` of the kernels, and raised otherwise."""
    begin, count = time.monotonic(), 0
    for case in cases:
        try:
            wrong = examined(case)
        except Exception as error:  # whatever a compiler, a driver or a kernel may raise
            if not is_result(error):
                raise
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if wrong:
            return Verdict(False, f"{wrong} ({case})", time.monotonic() - begin)
        count += 1
    return Verdict(True, f"{count} cases agree with {agree_with}", time.monotonic() - begin)


def check(
    device: torch.device, forward: Callable[..., Any], backward: Callable[..., Any], dtype: torch.dtype = torch.bfloat16
) -> Verdict:
    """All cases with these kernels, called as `attend.forward` and `attend_backward.backward`. A GPU that takes no more
    work is a no as well; any other exception is none of the kernels' results."""

    def examined(case: Case) -> str:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            states, mask = tensors(case, device)
            q, k, v, dout = states
            out, lse = forward(q, k, v, mask, softmax_scale=case.dim**-0.5)
            grads = backward(dout, None, q, k, v, out, lse, mask, softmax_scale=case.dim**-0.5)
            results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads[:3]), strict=True))
            return examine(case, states, mask, results)

    def stopped(error: Exception) -> bool:
        gpu = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        return gpu and "CUDA error" in str(error)

    return try_cases((case._replace(dtype=dtype) for case in cases()), examined, "the textbook", stopped)


def run(index: int = 0) -> Verdict:
    """Checks GPU number `index` and records the verdict, in this process too."""
    modules = [importlib.import_module(f"triton_sp.kernels.{name}") for name in ("attend", "attend_backward")]
    found = check(torch.device("cuda", index), modules[0].forward, modules[1].backward)
    verdict.write(KIND, verdict.machine(index, SOURCES), found)
    _known[index] = found
    return found


def known(index: int) -> Verdict | None:
    """The verdict on GPU number `index`, or None before the first check."""
    if index not in _known and (found := verdict.read(KIND, verdict.machine(index, SOURCES))) is not None:
        _known[index] = found
    return _known.get(index)


def require(device: torch.device | str) -> None:
    """Raise if the kernels are wrong on a GPU; where nobody knows, find out. TRITON_SP_SELF_CHECK=0 does neither.

    Nothing is run while a CUDA graph is captured, which allows no waiting: then the next call finds out.

    Raises:
        UnsupportedKernelError: the self-check has failed here.
    """
    if os.environ.get("TRITON_SP_SELF_CHECK") == "0" or not torch.cuda.is_available():
        return
    device = torch.device(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    found = known(index)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return
        found = run(index)
    if not found.passed:
        raise UnsupportedKernelError(
            f"attention kernels on {torch.cuda.get_device_name(index)}",
            expected="the results of the textbook",
            found=found.reason,
            remedy=REMEDY,
        )


def main() -> int:
    """All self-checks on the first GPU; 1 if one that is possible here has failed."""
    if not torch.cuda.is_available():
        print("portable: PyTorch sees no GPU")
        return 2
    from triton_sp.kernels.hopper import check as hopper
    from triton_sp.kernels.hopper import gate

    found = run()
    print(f"portable: {'right' if found.passed else 'WRONG'} after {found.seconds:.1f} s: {found.reason}", flush=True)
    if not found.passed:
        return 1
    if reason := gate.obstacle(0):
        print(f"gluon: not for this machine: {reason}")
        return 0
    passed = True
    for kind in (gate.FORWARD, gate.BACKWARD):
        found = hopper.run(0, kind)
        print(f"{kind}: {'on' if found.passed else 'OFF'} after {found.seconds:.1f} s: {found.reason}", flush=True)
        passed &= found.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
