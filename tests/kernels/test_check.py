"""The self-check of the kernels on the CPU: what it finds wrong, what it records, and who raises."""

import sys

import pytest
import torch

pytest.importorskip("triton")


import triton_sp
from triton_sp.errors import UnsupportedKernelError
from triton_sp.kernels import check, verdict
from triton_sp.kernels.verdict import Verdict
from triton_sp.ops import attend_cpu, dispatch

NAMES = ("out", "lse", "dq", "dk", "dv")
CPU = torch.device("cpu")


def forward(q, k, v, mask, *, softmax_scale):
    """The library's reference in the place of a kernel: in fp32, as kernels add up, and 0 where nothing is seen."""
    wide = [x.float().nan_to_num() for x in (q, k, v)]
    out, lse = attend_cpu.attend(*wide, mask, softmax_scale=softmax_scale, softcap=0.0)
    return out.to(q.dtype), lse


def backward(dout, dlse, q, k, v, out, lse, mask, *, softmax_scale):
    wide = [x.float().nan_to_num() for x in (q, k, v, out)]
    grads = attend_cpu.attend_backward(
        dout.float().nan_to_num(), dlse, (*wide, lse), mask, softmax_scale=softmax_scale, softcap=0.0
    )
    return [x.to(q.dtype) for x in grads[:3]]


@pytest.fixture
def few(monkeypatch):
    """The cases with short segments; the arithmetic is that of bf16."""
    lengths = (20, 0, 1, 33, 9)
    small = [c._replace(q=lengths, k=lengths, poisoned=4, window=c.window and 7) for c in check.cases()]
    monkeypatch.setattr(check, "cases", lambda: small)
    return small


def test_right_kernels_pass_and_each_wrong_result_is_named(few):
    found = check.check(CPU, forward, backward)
    assert found.passed and found.reason == f"{len(few)} cases agree with the textbook", found

    def spoiled(name, spoil):
        def attend(*tensors, **options):
            results = list(forward(*tensors, **options))
            if name in NAMES[:2]:
                spoil(results[NAMES.index(name)])
            return results

        def grads(*tensors, **options):
            results = backward(*tensors, **options)
            if name in NAMES[2:]:
                spoil(results[NAMES.index(name) - 2])
            return results

        return check.check(CPU, attend, grads)

    for name in NAMES:
        for spoil in (
            lambda x: x.mul_(1.05),
            lambda x: x[1, :1].add_(0.5),
            lambda x: x[1, :1].fill_(torch.nan),
            lambda x: x.view(-1)[-1:].fill_(torch.nan),  # past the last segment
        ):
            found = spoiled(name, spoil)
            assert not found.passed and found.reason.startswith(f"{name} is off by up to"), (name, found)


def test_cases_are_those_of_towers_and_language_models():
    found = list(check.cases())
    assert {case.dim for case in found} >= {64, 72, 80, 128}
    assert {(case.causal, case.heads > case.k_heads) for case in found} >= {(True, True), (False, False)}
    for case in found:
        (q, *_), mask = check.tensors(case, CPU)
        assert (
            not q.is_contiguous() and q[-5:].isnan().all() and (case.causal, case.window) == (mask.causal, mask.window)
        )
        assert (case.layout == "heads first") == (q.stride(0) < q.stride(1)), case
    state = torch.get_rng_state()
    check.tensors(found[0], CPU)
    assert torch.equal(state, torch.get_rng_state()), "the program's random numbers are left alone"


def test_what_is_no_result_is_no_verdict(few):
    def broken(message, kind=RuntimeError):
        def attend(*_, **__):
            raise kind(message)

        return attend

    found = check.check(CPU, broken("CUDA error: an illegal memory access was encountered"), backward)
    assert not found.passed and "illegal memory access" in found.reason
    for kind, message in ((torch.OutOfMemoryError, "CUDA error: out of memory"), (RuntimeError, "no C compiler")):
        with pytest.raises(kind):
            check.check(CPU, broken(message, kind), backward)


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """A machine with a GPU on which nothing was checked; a list of the GPUs that are checked from here on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_SP_SELF_CHECK", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in (
        ("is_available", lambda: True),
        ("current_device", lambda: 0),
        ("get_device_name", lambda index: f"G{index}"),
        ("get_device_capability", lambda index: (8, 0)),
        ("is_current_stream_capturing", lambda: False),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(verdict, "driver", lambda: "1")
    monkeypatch.setattr(check, "_known", {})
    found = []

    def counted(device, *_):
        found.append(device.index)
        return Verdict(device.index == 0, "said so", 3.0)

    monkeypatch.setattr(check, "check", counted)
    return found


def test_once_a_machine_and_wrong_kernels_raise(checked, monkeypatch):
    for _ in range(2):
        assert dispatch.implementation("cuda") == "triton"
    monkeypatch.setattr(check, "_known", {})  # another process
    assert dispatch.implementation("cuda:0") == "triton" and checked == [0]
    assert check.known(0) == Verdict(True, "said so", 3.0)
    for _ in range(2):
        with pytest.raises(UnsupportedKernelError, match=r"on G1: .* found said so. Remedy: .*TRITON_PTXAS_PATH"):
            dispatch.implementation("cuda:1")
    assert checked == [0, 1]
    small = torch.nn.Linear(1, 1)
    monkeypatch.setattr(sys.modules["triton_sp.explain"], "device_of", lambda model: torch.device("cuda", 1))
    assert triton_sp.explain(small).attention.startswith("nothing on this machine: attention kernels on G1")
    monkeypatch.setenv("TRITON_SP_SELF_CHECK", "0")
    assert dispatch.implementation("cuda:1") == "triton"


def test_nothing_runs_while_a_graph_is_captured(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.implementation("cuda") == "triton" and checked == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.implementation("cuda") == "triton" and checked == [0]


def test_a_verdict_holds_for_one_assembler(checked, monkeypatch, tmp_path):
    here = verdict.machine(0, check.SOURCES)
    assert here["assembler"].startswith("ptxas 1") and here["assembler"].endswith("ptxas")
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.9, V13.9.1'\n")
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    there = verdict.machine(0, check.SOURCES)
    assert there == here | {"assembler": f"ptxas 13.9, {other}"}
    verdict.write(check.KIND, here, Verdict(True, "", 1.0))
    assert verdict.read(check.KIND, here) is not None and verdict.read(check.KIND, there) is None
