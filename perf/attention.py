"""Who computes attention: this library and its peers, and the textbook that all of them are held to."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perf.cases import AttentionCase
from triton_sp import Mask, varlen_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A provider of attention.

    Attributes:
        prepare: from a case and its cu_seqlens, a function of packed q (T, H, D), k and v (T, K, D).
        absent: why it cannot run on a device, or "". A peer that is absent has no row.
        fits: whether it can be asked for a case at all.
        around: what has to be in place while it runs.
        slow_to_start: it compiles for many seconds: only with `--slow`.
    """

    name: str
    prepare: Callable[[AttentionCase, Tensor], Attend]
    absent: Callable[[torch.device], str]
    fits: Callable[[AttentionCase], bool] = lambda case: True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    directions: tuple[str, ...] = ("forward", "backward")
    slow_to_start: bool = False
    note: str = ""


def _anywhere(device: torch.device) -> str:
    return ""


def _on_gpu(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a GPU"


# --- this library ------------------------------------------------------------------------------------------------


def _ours(case: AttentionCase, table: Tensor) -> Attend:
    return lambda q, k, v: varlen_attention(q, k, v, Mask(table, causal=case.causal))


def _gluon_absent(device: torch.device, kind: str = "gluon") -> str:
    if device.type != "cuda":
        return "needs an sm_90 GPU"
    from triton_sp.kernels.hopper import gate

    found = gate.known(torch.cuda.current_device(), kind)
    return "" if found.passed else found.reason


def _five_absent(device: torch.device) -> str:
    return _gluon_absent(device, "gluon-backward")


def _tier(gluon: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.dict(os.environ, TRITON_SP_GLUON=gluon)


# --- torch -------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend | None) -> Callable[[AttentionCase, Tensor], Attend]:
    def prepare(case: AttentionCase, table: Tensor) -> Attend:
        rows, length = len(case.lengths), case.lengths[0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(rows, length, -1, case.dim).transpose(1, 2) for x in (q, k, v))
            with nullcontext() if backend is None else sdpa_kernel(backend):
                grouped = case.heads != case.kv_heads
                out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(0, 1)

        return attend

    return prepare


def _torch_varlen(case: AttentionCase, table: Tensor) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    known, longest = inspect.signature(varlen_attn).parameters, max(case.lengths)
    options: dict[str, Any] = {"is_causal": case.causal}  # 2.10; later a window
    if "window_size" in known:
        options = {"window_size": (-1, 0 if case.causal else -1)}
    if case.heads != case.kv_heads and "enable_gqa" in known:  # before 2.12 it takes grouped heads without being told
        options["enable_gqa"] = True
    return lambda q, k, v: varlen_attn(q, k, v, table, table, longest, longest, **options)


def _varlen_absent(device: torch.device) -> str:
    return _on_gpu(device) or ("" if importlib.util.find_spec("torch.nn.attention.varlen") else "needs torch 2.10")


def _cudnn_absent(device: torch.device) -> str:
    if reason := _varlen_absent(device):
        return reason
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return "" if hasattr(varlen, "_should_use_cudnn") else "this torch has no switch for it"


def _cudnn_varlen() -> AbstractContextManager[Any]:
    return mock.patch("torch.nn.attention.varlen._should_use_cudnn", lambda *_: True)


def _flex(case: AttentionCase, table: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_gpu = table.is_cuda
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    owner = torch.repeat_interleave(torch.arange(len(case.lengths), device=table.device), table.diff())

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = owner[row] == owner[key]
        return same & (row >= key) if case.causal else same

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, table.device.type, _compile=on_gpu)
    if on_gpu:
        torch._dynamo.reset()  # after 8 shapes it would stop compiling
    run = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)[0].transpose(0, 1)

    return attend


# --- others ------------------------------------------------------------------------------------------------------


def _fa4_absent(device: torch.device) -> str:
    if reason := _on_gpu(device):
        return reason
    try:
        importlib.import_module("flash_attn.cute")
    except Exception as error:  # whatever a compiler stack raises at import
        return f"flash-attn-4 cannot be imported: {error}"[:200]
    return ""


def _fa4(case: AttentionCase, table: Tensor) -> Attend:
    varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    known, longest = inspect.signature(varlen).parameters, max(case.lengths)
    options = {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in known}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = varlen(q, k, v, cu_seqlens_q=table, cu_seqlens_k=table, causal=case.causal, **options)
        return found[0] if isinstance(found, tuple) else found

    return attend


def _fa3_absent(device: torch.device) -> str:
    if reason := _on_gpu(device):
        return reason
    return "" if importlib.util.find_spec("flash_attn_interface") else "FlashAttention 3 is not installed"


def _fa3(case: AttentionCase, table: Tensor) -> Attend:
    varlen, longest = importlib.import_module("flash_attn_interface").flash_attn_varlen_func, max(case.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = varlen(q, k, v, table, table, longest, longest, causal=case.causal)
        return found[0] if isinstance(found, tuple) else found

    return attend


FA4_NOTE = "its dQ on Hopper is known to be wrong at head dim 72: flash-attention PR 2896"
PEERS = [
    Peer("triton_sp", _ours, _anywhere, around=_tier("0")),
    Peer(
        "triton_sp gluon", _ours, _gluon_absent, lambda case: case.dim in (64, 72, 80, 128), _tier("1"), ("forward",)
    ),
    Peer(
        "triton_sp gluon, 5 products", _ours, _five_absent, lambda case: case.dim in (64, 72, 80, 128), _tier("1"),
        note="backward of five products; the forward is the best of ours here",
    ),
    Peer("torch varlen (FA2)", _torch_varlen, _varlen_absent),
    Peer("torch varlen (cuDNN)", _torch_varlen, _cudnn_absent, around=_cudnn_varlen),
    Peer("SDPA cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION), _on_gpu, lambda case: case.dense),
    Peer("SDPA flash", _sdpa(SDPBackend.FLASH_ATTENTION), _on_gpu, lambda case: case.dense),
    Peer("SDPA efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _on_gpu, lambda case: case.dense),
    Peer("FA3", _fa3, _fa3_absent),
    Peer("FA4", _fa4, _fa4_absent, note=FA4_NOTE),
    Peer("FlexAttention", _flex, _on_gpu, lambda case: case.tokens <= 1 << 16, slow_to_start=True),
    Peer("SDPA", _sdpa(None), lambda device: "" if device.type == "cpu" else "on GPUs by backend", lambda c: c.dense),
    Peer(
        "FlexAttention eager", _flex, lambda device: "" if device.type == "cpu" else "compiled there",
        lambda case: case.tokens <= 2048, directions=("forward",), note="not compiled: compiled it has no CPU backward",
    ),
]  # fmt: skip


# --- the textbook ------------------------------------------------------------------------------------------------


def sampled_rows(case: AttentionCase) -> Tensor:
    """Rows to check, from the first to the last: at most 256, fewer where their scores would take over 512 MiB."""
    count = min(256, max(16, 2**27 // (case.heads * max(case.lengths))), case.tokens)
    return torch.linspace(0, case.tokens - 1, count, dtype=torch.float64).round().long().unique()


def textbook(case: AttentionCase, rows: Tensor, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """out and dq of some rows, dk and dv of all keys, for a gradient that is 0 in all other rows; all in `dtype`.

    So the cost is that of the sampled rows, however long the stream is, and every head and key is looked at.
    """
    q, k, v, dout = (x.to(dtype) for x in tensors)
    group, scale, out, dq = case.heads // case.kv_heads, case.dim**-0.5, [], []
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    starts = case.segments.starts
    for index in sorted({case.segments.at(int(row)) for row in rows}):
        keys = slice(starts[index], starts[index + 1])
        mine = rows[(rows >= keys.start) & (rows < keys.stop)].to(q.device)
        q_KGRD, dout_KGRD = (x[mine].unflatten(1, (case.kv_heads, group)).permute(1, 2, 0, 3) for x in (q, dout))
        k_KLD, v_KLD = k[keys].transpose(0, 1), v[keys].transpose(0, 1)
        s = torch.einsum("kgrd,kld->kgrl", q_KGRD, k_KLD) * scale
        if case.causal:
            s = s.masked_fill(torch.arange(keys.start, keys.stop, device=q.device) > mine[:, None], -torch.inf)
        p = s.softmax(-1)
        o = torch.einsum("kgrl,kld->kgrd", p, v_KLD)
        dp = torch.einsum("kgrd,kld->kgrl", dout_KGRD, v_KLD)
        ds = p * (dp - (dout_KGRD * o).sum(-1, keepdim=True)) * scale
        out.append(o.permute(2, 0, 1, 3).flatten(1, 2))
        dq.append(torch.einsum("kgrl,kld->kgrd", ds, k_KLD).permute(2, 0, 1, 3).flatten(1, 2))
        dk[keys] = torch.einsum("kgrl,kgrd->lkd", ds, q_KGRD)
        dv[keys] = torch.einsum("kgrl,kgrd->lkd", p, dout_KGRD)
    return [torch.cat(out), torch.cat(dq), dk, dv]


def error_ratio(found: Tensor, exact: Tensor, plain: Tensor, slack: float = 1e-5) -> float:
    """The largest error over that of the textbook in the same dtype; NaN is infinitely wrong.

    >>> one = torch.ones(2)
    >>> round(error_ratio(one + 0.03, one, one + 0.01), 2)
    3.0
    """
    error, usual = ((x.to(exact.dtype) - exact).abs().max() for x in (found, plain))
    return float((error / (usual + slack)).nan_to_num(torch.inf))
