"""The gate of the Gluon tier on the CPU: what a machine says is injected, and so are the kernels of the self-check."""

import json

import pytest
import torch

pytest.importorskip("triton")

from triton_sp import cache
from triton_sp.kernels import attend as kernels_attend
from triton_sp.kernels import attend_backward, verdict
from triton_sp.kernels import check as portable
from triton_sp.kernels.hopper import attend, backward, check, gate
from triton_sp.kernels.mask import Grads, Mask
from triton_sp.kernels.verdict import Verdict
from triton_sp.ops import attend_cpu, dispatch, varlen

HERE = {"gpu": "H", "driver": "1", "triton": "3.6.0"}
PASSED = Verdict(True, "as expected")


def write(found):
    return verdict.write(gate.FORWARD, HERE, found)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine whose GPU is an H100, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_SP_GLUON", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gate, "missing_api", lambda: "")
    monkeypatch.setattr(verdict, "machine", lambda index, sources: HERE)
    monkeypatch.setattr(portable, "_known", {0: PASSED})
    gate.known.cache_clear()
    yield tmp_path
    gate.known.cache_clear()


def test_opens_only_with_a_passed_check(hopper):
    assert gate.verdict("cuda") == Verdict(False, gate.MISSING) and dispatch.implementation("cuda") == "triton"
    gate.known.cache_clear()
    write(PASSED)
    assert gate.verdict("cuda:0") == PASSED and dispatch.implementation("cuda") == "gluon"
    assert gate.verdict("cpu").reason == "cpu is no GPU that PyTorch sees"
    cache.file_for(gate.FORWARD, HERE).unlink()
    assert gate.verdict("cuda").passed, "read once in a process"


def test_environment_closes_it_at_any_time(hopper, monkeypatch):
    write(PASSED)
    assert gate.verdict("cuda").passed
    monkeypatch.setenv("TRITON_SP_GLUON", "0")
    assert gate.verdict("cuda") == Verdict(False, "TRITON_SP_GLUON=0") and dispatch.implementation("cuda") == "triton"


@pytest.mark.parametrize("chip", [(8, 0), (10, 0)])
def test_other_chips_are_portable(hopper, monkeypatch, chip):
    write(PASSED)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: chip)
    assert "sm_90" in gate.verdict("cuda").reason and dispatch.implementation("cuda") == "triton"


def test_other_versions_of_gluon_are_portable(hopper, monkeypatch):
    write(PASSED)
    monkeypatch.undo()
    monkeypatch.setattr(gate, "API", [*gate.API, ("nvidia.hopper.tma", "async_load_of_another_version")])
    assert gate.missing_api().endswith("tma.async_load_of_another_version")
    monkeypatch.setattr(gate, "API", [("nvidia.venus", "tma")])
    assert "nvidia.venus" in gate.missing_api()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        json.dumps({"machine": HERE, "passed": "yes", "reason": "", "seconds": 1.0}),
        json.dumps({"machine": {**HERE, "driver": "2"}, "passed": True, "reason": "", "seconds": 1.0}),
        json.dumps({"machine": HERE, "passed": True}),
    ],
)
def test_what_is_no_verdict_is_portable(hopper, content):
    write(PASSED).write_text(content)
    assert gate.verdict("cuda") == Verdict(False, gate.MISSING)


def test_another_machine_or_version_has_another_file(hopper):
    def file(**changed):
        return cache.file_for(gate.FORWARD, HERE | changed)

    files = {file(**{key: "other"}) for key in HERE} | {file(), cache.file_for(gate.BACKWARD, HERE)}
    assert len(files) == len(HERE) + 2
    assert set(gate.SOURCES) >= {"hopper/attend.py", "hopper/backward.py", "hopper/tiles.py", "tiles.py"}


def fake(q, k, v, mask, **__):
    return q.nan_to_num(), q.float().nan_to_num().sum(-1)


def off(amount, only=None):
    """A kernel that is off by `amount`, or only in its waiting variant."""

    def attend(*tensors, wait=False, **_):
        out, lse = fake(*tensors)
        out[0, 0, 0] += amount if only is None or only == wait else 0
        return out, lse

    return attend


def short(q, k):
    """The cases with short segments."""
    return [c._replace(q=q, k=q if c.layout == "side by side" else k, poisoned=None) for c in check.cases()]


def test_check_passes_equal_kernels_and_names_what_differs(monkeypatch):
    few = short([3, 0, 2], [1, 2, 3])
    monkeypatch.setattr(check, "cases", lambda: few)
    device = torch.device("cpu")

    def checked(gluon, portable):
        return check.check(device, lambda case: check.examine(case, device, gluon, portable))

    assert checked(fake, fake)[:2] == (True, f"{len(few)} cases agree with the portable kernel")
    assert "out differs" in checked(off(1.0), fake).reason
    assert "out differs" in checked(off(float("nan")), fake).reason
    assert "bit for bit" in checked(off(0.004, only=True), fake).reason

    def broken(*_, **__):
        raise RuntimeError("no such instruction")

    found = checked(broken, fake)
    assert not found.passed and found.reason.startswith("RuntimeError: no such instruction")


def test_cases_cover_what_the_tier_takes():
    assert {case.dim for case in check.cases()} == set(attend.DIMS)
    assert {case.dtype for case in check.cases()} == set(attend.DTYPES)
    (first,) = (c for c in check.cases() if c.layout == "heads first" and c.dim == 72 and c.dtype == torch.float16)
    (q, *_), mask = check.tensors(first, torch.device("cpu"))
    assert q.stride(0) < q.stride(1) and attend.takes(q, q, q, mask, 0.0)
    (q, *_), mask = check.tensors(next(check.cases()), torch.device("cpu"))
    assert not q.is_contiguous() and q[-5:].isnan().all() and int(mask.cu_seqlens_q[-1]) == len(q) - 5


def test_run_records_its_verdict_and_a_crash_is_a_no(hopper, monkeypatch):
    def agrees(device, examined):
        assert verdict.read(gate.FORWARD, HERE) == Verdict(False, "the self-check began and did not end")
        return PASSED

    monkeypatch.setattr(check, "check", agrees)
    assert not gate.verdict("cuda").passed  # and asked before: run() clears it
    assert check.run() == PASSED == gate.verdict("cuda")
    monkeypatch.setattr(check, "check", lambda *_: 1 / 0)
    assert not check.run().passed and gate.verdict("cuda").reason.startswith("ZeroDivisionError")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert "sm_80" in check.run().reason


def test_check_of_the_backward_names_what_differs(monkeypatch):
    few = [case for case in short([9, 0, 20], [7, 2, 20]) if case.dim == 64][::2]
    monkeypatch.setattr(check, "cases", lambda: few)
    device = torch.device("cpu")

    def checked(spoil, name):
        def spoiled(dout, dlse, *states, softmax_scale):
            grads = list(reference_gradients(dout, dlse, *states, softmax_scale=softmax_scale))
            spoil(grads[("dq", "dk", "dv").index(name)])
            return grads

        def examined(case):
            return check.examine_backward(case, device, reference, spoiled, reference_gradients)

        return check.check(device, examined)

    for name in ("dq", "dk", "dv"):
        assert checked(lambda x: x.mul_(1.001), name).passed
        for spoil in (lambda x: x.mul_(1.05), lambda x: x[2].neg_(), lambda x: x[0, 0, :1].fill_(torch.nan)):
            found = checked(spoil, name)
            assert not found.passed and found.reason.startswith(name), found


def reference(q, k, v, mask, *, softmax_scale):
    out, lse = attend_cpu.attend(
        *(x.float().nan_to_num() for x in (q, k, v)), mask, softmax_scale=softmax_scale, softcap=0.0
    )
    return out.to(q.dtype), lse


def reference_gradients(dout, dlse, q, k, v, out, lse, mask, *, softmax_scale, softcap=0.0, sinks=None, grads=None):
    wide = [x.float().nan_to_num() for x in (q, k, v, out)]
    found = attend_cpu.attend_backward(
        dout.float(), dlse, (*wide, lse), mask, softmax_scale=softmax_scale, softcap=softcap
    )
    return Grads(*(x.to(q.dtype) for x in found[:3]))


def test_which_backward_runs(hopper, monkeypatch):
    """Five products only after a self-check of their own, and only where nobody asks for sums in a fixed order."""
    ran = []

    def counted(name):
        def backward(*arguments, **options):
            ran.append(name)
            return reference_gradients(*arguments, **options)

        return backward

    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    monkeypatch.setattr(dispatch, "portable", lambda device: "triton")
    monkeypatch.setattr(kernels_attend, "forward", lambda *x, softcap, sinks, **more: reference(*x, **more))
    monkeypatch.setattr(attend_backward, "backward", counted("seven"))
    monkeypatch.setattr(backward, "backward", counted("five"))
    monkeypatch.setattr(gate, "verdict", lambda device, kind: Verdict(kind in passed, ""))
    passed = {gate.FORWARD}
    q = torch.randn(9, 2, 64).bfloat16().requires_grad_()
    table = torch.tensor([0, 4, 9], dtype=torch.int32)

    def which(window=None, **options):
        mask = Mask(table, causal=True, window=window)
        varlen.varlen_attention(q, q, q, mask, **options).float().pow(2).sum().backward()
        return ran.pop()

    assert which() == "seven"
    passed.add(gate.BACKWARD)
    assert which() == "five"
    assert which(window=3) == "seven" and which(softcap=5.0) == "seven"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert which() == "seven"
    torch.use_deterministic_algorithms(False)
    states = [x.detach() for x in (q, q, q, q)]
    varlen.attend_backward(states[0], None, [*states, torch.zeros(2, 9)], [table, table], True, None, 0.125, 0.0)
    assert ran.pop() == "seven", "what torch.compile has traced"


def test_takes():
    q, table = torch.zeros(9, 2, 80, dtype=torch.float16), torch.tensor([0, 9])
    assert attend.takes(q, q[:, :1], q[:, :1], Mask(table, causal=True), 0.0)
    assert not attend.takes(q, q, q, Mask(table), 1.0)
    for change in ({"window": 6}, {"seqused_k": torch.zeros(1)}, {"key_ranges": torch.zeros(2, 9)}):
        assert not attend.takes(q, q, q, Mask(table, **change), 0.0)
    odd = torch.zeros(9, 2, 83, dtype=torch.float16)[..., :80]
    shifted = torch.zeros(9 * 160 + 1, dtype=torch.float16)[1:].view(9, 2, 80)
    for x in (q.float(), q[:0], torch.zeros(9, 2, 96).half(), odd, shifted, q[:1].expand(9, 2, 80)):
        assert not attend.takes(x, x, x, Mask(table), 0.0)
