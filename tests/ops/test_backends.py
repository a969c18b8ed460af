"""Implementations of attention from elsewhere: how they are called, what they take, and who is chosen."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kit import parity, zoo
from stand_ins import SIGNATURES, StandIn, installed, packaged
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode

import triton_sp
from triton_sp.anatomy.find import find_parts
from triton_sp.errors import InputError
from triton_sp.kernels.mask import Mask
from triton_sp.ops import varlen
from triton_sp.ops.backends import choice, flash_attention, measure, torch_kernels, verdict
from triton_sp.ops.backends.adapter import Call, Results
from triton_sp.ops.backends.choice import Choice
from triton_sp.plan.calibrate import compare_attention
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import ALONE
from triton_sp.wrappers.install import Installation

PACKAGES = [(name, version) for name, versions in SIGNATURES.items() for version in versions]
CLASSES = {x.name: x for x in (flash_attention.FlashAttention2, flash_attention.FlashAttention3)}


def call(lengths: tuple[int, ...] = (5, 9), device: str = "cpu", heads: int = 2, **settings: Any) -> Call:
    torch.manual_seed(0)
    total, dtype = sum(lengths), torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(total, n, 16, device=device, dtype=dtype) for n in (4, heads, heads))
    softcap = settings.pop("softcap", 0.0)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return Call(q, k, v, Mask(cu_seqlens, max_seqlens=(max(lengths),) * 2, **settings), 0.25, softcap)


def both(call: Call, attention: Choice | None) -> list[Tensor]:
    """out, dq, dk and dv, where a choice decides; gradients written into one buffer, as in a sharded layer."""
    factors = {"softmax_scale": call.softmax_scale, "softcap": call.softcap, "attention": attention}
    out, lse = varlen.forward(*call[:4], **factors)
    buffer = call.q.new_empty(len(call.q), 8, 16)
    grads = tuple(buffer.split([4, call.k.shape[1], call.v.shape[1]], 1))[:3]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *varlen.backward(dout, None, (*call[:3], out, lse), call.mask, **factors, grads=grads)[:3]]


@pytest.mark.parametrize(("name", "version"), PACKAGES)
@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"causal": True, "window": 3, "softcap": 5.0}])
def test_packages_are_called_as_they_are_declared(name: str, version: str, settings: dict[str, Any]) -> None:
    """The signatures are those of flash-attention's own source, so a name or an argument that is missing raises."""
    module, calls = packaged(name, version)
    adapter = CLASSES[name]()
    adapter.devices, adapter.dtypes = ("cpu",), (torch.float32,)  # type: ignore[misc]
    asked, who = call(**settings), Choice(name)
    wanted = both(asked, None)
    with mock.patch.dict(sys.modules, {adapter.source[0][0]: module}), installed(**{name: adapter}):  # type: ignore[dict-item]
        choice.require(name)
        found = both(asked, who)
    assert len(calls) == 2 and who.ran == {f"forward by {name}", f"backward by {name}"}
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("adapter", CLASSES.values())
def test_a_package_that_is_not_there_is_told_before_anything_changes(adapter: Any) -> None:
    hidden = dict.fromkeys((*adapter.source[0], "kernels", "flash_attn"))
    config, told = triton_sp.SPConfig(attention=adapter.name), f"SPConfig.attention.*{adapter.name}.*nor the kernels"
    with (
        mock.patch.dict(sys.modules, hidden),
        installed(**{adapter.name: adapter()}),
        pytest.raises(InputError, match=told),
    ):
        Installation(ALONE, config, find_parts(zoo.CASES["llama"].model()))


def test_from_the_hub() -> None:
    """Where no package is installed: with the functions of the Hub's build, or what the Hub said."""
    module, _ = packaged("flash_attention_2", "2.8.3")
    asked: list[tuple[str, int]] = []

    def get_kernel(repository: str, *, version: int) -> Any:
        asked.append((repository, version))
        if len(asked) == 1:
            raise OSError("no network")
        return SimpleNamespace(flash_attn_interface=module)

    adapter = flash_attention.FlashAttention2
    hidden = {"flash_attn": None, adapter.source[0][0]: None, "kernels": SimpleNamespace(get_kernel=get_kernel)}
    with mock.patch.dict(sys.modules, hidden):  # type: ignore[arg-type]
        assert "no network" in adapter().absent()
        assert adapter().absent() == "" and asked == [("kernels-community/flash-attn2", 4)] * 2
    old = SimpleNamespace(__name__="old", _flash_attn_varlen_forward=lambda q: q, _flash_attn_varlen_backward=None)
    for module, reason in (
        (old, "has no"),
        (SimpleNamespace(**{**vars(old), "_flash_attn_varlen_backward": max}), "old"),
    ):
        with mock.patch.dict(sys.modules, {adapter.source[0][0]: module}):  # type: ignore[dict-item]
            assert reason in adapter().absent()


class Recorded(TorchDispatchMode):
    """Which operators run, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention" in str(func):
            shown = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in args]
            self.calls.append((func, shown, {k: v for k, v in kwargs.items() if v is not None}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"causal": True, "window": 4}, {"window": 4}])
def test_torch_is_called_as_its_own_varlen_does(settings: dict[str, Any]) -> None:
    """By the PyTorch that is installed, on tensors without memory: the same operators with the same arguments."""
    asked, adapter = call(device="meta", **settings), torch_kernels.TorchFlash()
    (left, right), tables = asked.reach, asked.mask.tables[:2]
    out, lse = (x.to("meta") for x in (torch.empty(14, 4, 16).half(), torch.empty(4, 14)))
    grads = tuple(torch.empty_like(x) for x in asked[:3])
    with Recorded() as ours:
        found = adapter.forward(asked)
        adapter.backward(asked, Results(out, out, lse), grads)  # type: ignore[arg-type]
    causal = (left, right) == (-1, 0)
    states, sizes = (*asked[:3], *tables), asked.max_seqlens
    with Recorded() as theirs:
        _, _, state = torch_varlen._varlen_attn._init_fn(
            *(*states, *sizes, causal, asked.softmax_scale, [left, right], True)
        )
        torch_varlen._varlen_attn_backward._init_fn(
            *(out, *asked[:3], out, lse, *tables, *sizes, causal, state, asked.softmax_scale, [left, right])
        )
    assert ours.calls == theirs.calls and len(ours.calls) == 2
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (out, lse)]


def test_cudnn_sees_segments_of_one_length() -> None:
    """Its operators are declared by PyTorch, and played here by scaled_dot_product_attention in another layout."""
    asked, adapter = call((7, 7, 7), causal=True), torch_kernels.Cudnn()
    saved: list[Tensor] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, bias: None, lse: bool, p: float, causal: bool, *_: Any, scale: float):
        assert q.shape == (3, 4, 7, 16) and k.shape == (3, 2, 7, 16) and bias is None and lse and not p
        scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * scale).masked_fill(
            torch.ones(7, 7).triu(1).bool() & causal, -torch.inf
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        saved[:] = [out, scores.logsumexp(-1, keepdim=True)]
        return *saved, None, None, 7, 7, None, None, None

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any, scale: float):
        torch.testing.assert_close([out, lse], saved, rtol=0, atol=1e-6)
        states = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = F.scaled_dot_product_attention(*states, is_causal=others[-1], scale=scale, enable_gqa=True)
        return torch.autograd.grad(again, states, dout)

    played = {"_scaled_dot_product_cudnn_attention": forward, "_scaled_dot_product_cudnn_attention_backward": backward}
    adapter.devices, adapter.dtypes = ("cpu",), (torch.float32,)  # type: ignore[misc]
    wanted = both(asked, None)
    with mock.patch.object(torch_kernels, "_ops", SimpleNamespace(**played)), installed(cudnn=adapter):
        found = both(asked, Choice("cudnn"))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    shaped = call((7, 7, 7), device="meta")
    out, lse = torch_kernels.Cudnn().forward(shaped)  # as PyTorch declares them
    assert out.shape == shaped.q.shape and lse.shape == (4, 21)
    grads = tuple(torch.empty_like(x) for x in shaped[:3])
    torch_kernels.Cudnn().backward(shaped, Results(out, out, lse), grads)  # type: ignore[arg-type]
    assert "one length" in adapter.obstacle("forward", call((7, 8))) and not adapter.obstacle("backward", asked)


REFUSED = {
    "GPU": (torch_kernels.TorchFlash(), {}, "runs on cuda, not on cpu"),
    "softcap": (torch_kernels.TorchFlash(), {"softcap": 5.0}, "no softcap"),
    "window": (torch_kernels.Cudnn(), {"causal": True, "window": 3}, "no windows"),
    "padded": (StandIn(), {"seqused_k": torch.tensor([5, 3])}, "neither spans nor padded"),
    "int64": (StandIn(), {"cu_seqlens_k": None}, "int32"),
    "unknown": (StandIn(), {}, "longest segment"),
    "dtype": (StandIn(), {}, "not torch.float16"),
    "head dim": (StandIn(), {}, "multiple of 8"),
    "empty": (StandIn(), {}, "empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_taken_runs_on_ours_and_is_told(kind: str) -> None:
    adapter, settings, reason = REFUSED[kind]
    asked, who = call(**settings), Choice(adapter.name)
    if kind in ("softcap", "window"):
        adapter.devices, adapter.dtypes = ("cpu",), (torch.float32,)  # type: ignore[misc]
    if kind == "int64":
        asked = asked._replace(mask=asked.mask._replace(cu_seqlens_q=asked.mask.cu_seqlens_q.long()))
    if kind == "unknown":
        asked = asked._replace(mask=asked.mask._replace(max_seqlens=None))
    if kind == "dtype":
        asked = asked._replace(**{name: getattr(asked, name).half() for name in "qkv"})
    if kind == "head dim":
        asked = asked._replace(**{name: getattr(asked, name)[..., :12] for name in "qkv"})
    if kind == "empty":
        asked = asked._replace(**{name: getattr(asked, name)[:0] for name in "qkv"})
    with installed(**{adapter.name: adapter}):
        assert who.pick("forward", asked) is None
    assert len(who.ran) == 1 and "forward by ours (" in min(who.ran) and reason in min(who.ran)


def test_each_direction_by_itself() -> None:
    """Another's forward and our backward, and the other way round, are exact together."""
    for only, other in (("forward", "backward"), ("backward", "forward")):
        adapter, asked, who = StandIn(only=only), call(causal=True), Choice("torch")
        wanted = both(asked, None)
        with installed(torch=adapter):
            found = both(asked, who)
        assert [direction for direction, _ in adapter.calls] == [only]
        assert who.ran == {f"{only} by torch", f"{other} by ours (torch has no {other})"}
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def sharded_step(name: str, batch: str, reference: Any, plan: str) -> tuple[list[str], set[tuple[int, int]], str]:
    """A step on a rank where a stand-in attends: which calls it got, with which longest segments; parity asserted."""
    adapter, case = StandIn(), zoo.CASES[name]
    model = case.model()
    with installed(torch=adapter):
        group = triton_sp.wrap(model, config=triton_sp.SPConfig(attention="torch", plan=plan))
        found = parity.step(group, case.batch(batch))
    parity.assert_close(found, reference, 1e-10)
    given = [c.mask for _, c in adapter.calls]
    assert all((m.cu_seqlens_q.diff().max(), m.tables[1].diff().max()) == m.max_seqlens for m in given)
    return [direction for direction, _ in adapter.calls], {m.max_seqlens for m in given}, str(triton_sp.explain(model))


@pytest.mark.parametrize("plan", ["heads", "segments"])
def test_a_sharded_model_attends_by_the_chosen_one(ranks, plan: str) -> None:
    case = zoo.CASES["llama"]
    batch = "packed" if "packed" in case.batches else next(iter(case.batches))
    expected = parity.exact_step(case.model(), case.batch(batch))
    for directions, longest, told in ranks.run(sharded_step, "llama", batch, expected, plan, ranks=2):
        assert directions.count("forward") == directions.count("backward") > 0 and longest
        assert "attention backward by torch, forward by torch" in told


def test_the_longest_segment_comes_from_the_plan() -> None:
    """Of any rows and keys, by brute force."""
    lengths = (3, 0, 8, 1, 5)
    starts = tuple(sum(lengths[:i]) for i in range(6))
    table = torch.tensor(starts, dtype=torch.int32)
    stream = Stream(ALONE, Shards((17,)), table, host_segments=Segments(starts))
    for rows in (range(17), range(2, 9), range(4, 5), range(11, 17), range(0)):
        for keys in (rows, range(min(rows.start, 3), rows.stop)):
            mask = stream.mask(rows, keys, True, None)
            found = [int(x.diff().max()) if len(x) > 1 else 0 for x in mask.tables[:2] if x is not None]
            assert list(mask.max_seqlens or ()) == found
    assert Stream(ALONE, Shards((17,)), table).mask(range(17), range(17), True, None).max_seqlens is None


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdict.gains.cache_clear()
    yield tmp_path
    verdict.gains.cache_clear()


def finding(name: str, theirs: float, wrong: str = "", direction: Any = "forward", causal: bool = False) -> Any:
    return verdict.Finding(name, direction, 16, causal, wrong, 1.0, theirs)


def test_auto_takes_what_is_recorded_as_faster(cache, monkeypatch) -> None:
    adapters = {"torch": StandIn(), "cudnn": StandIn(only="backward")}
    who, asked = Choice("auto"), call()
    with installed(**adapters):
        assert who.pick("forward", asked) is None
        found = [finding("torch", 0.8), finding("cudnn", 0.5), finding("torch", 0.95, causal=True)]
        path = verdict.store("cpu", [*found, finding("cudnn", 0.1, "dq differs", "backward")])
        assert who.pick("forward", asked) is adapters["torch"], "cudnn is faster, and does not take it"
        assert who.pick("forward", call(causal=True)) is None, "less than a tenth faster"
        assert who.pick("backward", asked) is None, "fast, and wrong"
        monkeypatch.setattr(verdict, "machine", lambda kind: {"device": "another"})
        verdict.gains.cache_clear()
        assert who.pick("forward", asked) is None, "what another machine has found"
        monkeypatch.undo()
    path.write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    verdict.gains.cache_clear()
    with pytest.raises(InputError, match="run triton-sp calibrate again"):
        who.pick("forward", asked)


def test_calibrate_compares_before_it_times(cache, monkeypatch) -> None:
    """What is right is timed; what is wrong or raises is recorded as such."""

    class Raising(StandIn):
        def backward(self, *_: Any) -> None:
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "DIMS", (16,))
    monkeypatch.setattr(measure, "SHAPES", ((9, 1, 4),))
    with installed(torch=StandIn(), cudnn=StandIn(off=torch.nan), flash_attention_2=Raising(off=0.1)):
        for adapter in choice.adapters().values():
            adapter.dtypes = (torch.bfloat16,)  # type: ignore[misc]
        choice.adapters()["cudnn"].name, choice.adapters()["flash_attention_2"].name = "cudnn", "flash_attention_2"  # type: ignore[misc]
        findings, path = compare_attention(torch.device("cpu"))
    assert len(findings) == 2 * 3 * 2 and path.exists()
    for found in findings:
        right = found.name == "torch" or (found.name == "cudnn" and found.direction == "backward")
        assert (found.gain > 0) == right == (not found.wrong) and found.name in str(found)
    assert {f.wrong for f in findings if f.name == "flash_attention_2" and f.direction == "backward"} == {
        "RuntimeError: illegal memory access"
    }
