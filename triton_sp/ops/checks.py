"""What a call of varlen_attention must fulfil, and the error where it does not."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from triton_sp.errors import InputError
from triton_sp.kernels.mask import Mask

_INDEX = (torch.int32, torch.int64)


def check_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None, softmax_scale: float | None) -> None:
    """Everything that can be seen without reading the values of a tensor."""
    _check_states(q, k, v)
    if not isinstance(mask, Mask):
        raise InputError(
            "mask",
            expected="a triton_sp.Mask",
            found=type(mask).__name__,
            remedy="pass Mask(cu_seqlens, causal=...)",
        )
    _check_tables(mask, q)
    _check_ranges(mask, q)
    for name, value, low in (("window", mask.window, 1), ("softcap", softcap, 0.0)):
        if value is not None and value < low:
            raise InputError(
                name, expected=f"None or at least {low}", found=str(value), remedy="pass None for no limit"
            )
    if softmax_scale is not None and softmax_scale <= 0:
        raise InputError(
            "softmax_scale",
            expected="a factor above 0",
            found=str(softmax_scale),
            remedy="negate q instead",
        )


def _check_states(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or v.shape[:2] != k.shape[:2] or v.ndim != 3 or q.shape[2] != k.shape[2]:
        raise InputError(
            "q, k, v",
            expected="(T, H, D), (T_k, K, D), (T_k, K, V)",
            found=shapes,
            remedy="pack the tokens of the batch into one stream",
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(
            "q, k, v", expected="H a multiple of K", found=shapes, remedy="give every key head the same query heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise InputError(
            "q, k, v", expected="one floating dtype", found=f"{q.dtype}, {k.dtype}, {v.dtype}", remedy="convert them"
        )


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """One score for each query head, where q is."""
    if sinks is None:
        return
    if sinks.shape != q.shape[1:2] or sinks.device != q.device or not sinks.is_floating_point():
        raise InputError(
            "sinks",
            expected=f"a floating dtype of shape ({q.shape[1]},) on {q.device}",
            found=f"{sinks.dtype} of shape {tuple(sinks.shape)} on {sinks.device}",
            remedy="give one sink for each query head",
        )


def _check_tables(mask: Mask, q: Tensor) -> None:
    cu_seqlens_q, cu_seqlens_k, seqused_k, _ = mask.tables
    segments = mask.cu_seqlens_q.shape[0] - 1 if mask.cu_seqlens_q.ndim == 1 else -1
    for name, table, size in (
        ("cu_seqlens_q", cu_seqlens_q, max(segments, 0) + 1),
        ("cu_seqlens_k", cu_seqlens_k, segments + 1),
        ("seqused_k", seqused_k, segments),
    ):
        if table is None:
            continue
        if table.dtype not in _INDEX or tuple(table.shape) != (size,) or table.device != q.device:
            raise InputError(
                name,
                expected=f"int32 or int64 of shape ({size},) on {q.device}",
                found=f"{table.dtype} of shape {tuple(table.shape)} on {table.device}",
                remedy="pass one more entry than segments, starting with 0 (seqused_k: one for each segment)",
            )


def _check_ranges(mask: Mask, q: Tensor) -> None:
    ranges = mask.key_ranges
    if ranges is None:
        return
    if mask.causal or mask.window is not None:
        raise InputError(
            "key_ranges",
            expected="neither causal nor window together with key_ranges",
            found=f"causal={mask.causal}, window={mask.window}",
            remedy="put both into the ranges",
        )
    if ranges.dtype not in _INDEX or tuple(ranges.shape) != (2, q.shape[0]) or ranges.device != q.device:
        raise InputError(
            "key_ranges",
            expected=f"int32 or int64 of shape (2, {q.shape[0]}) on {q.device}",
            found=f"{ranges.dtype} of shape {tuple(ranges.shape)} on {ranges.device}",
            remedy="give the first key of each row, and the one past its last",
        )


def check_values(rows: int, keys: int, mask: Mask) -> None:
    """The values of the tables, where looking is free: on the CPU, and on a GPU only if TRITON_SP_DEBUG=1."""
    if not mask.cu_seqlens_q.is_cpu and os.environ.get("TRITON_SP_DEBUG") != "1":
        return
    cu_seqlens_q, cu_seqlens_k, used, ranges = mask.tables
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    for name, table, total in (("cu_seqlens_q", cu_seqlens_q, rows), ("cu_seqlens_k", cu_seqlens_k, keys)):
        if int(table[0]) != 0 or bool((table.diff() < 0).any()) or int(table[-1]) > total:
            raise InputError(
                name,
                expected=f"entries that start at 0, never decrease and end by {total}",
                found=str(table.tolist()),
                remedy="pass the cumulated lengths of the segments",
            )
    if used is not None and bool(((used < 0) | (used > cu_seqlens_k.diff())).any()):
        raise InputError(
            "seqused_k",
            expected="no more keys than the segment has",
            found=f"{used.tolist()} of {cu_seqlens_k.diff().tolist()}",
            remedy="count keys from the start of each segment",
        )
    if ranges is not None and bool((ranges.diff() < 0).any()):
        raise InputError(
            "key_ranges",
            expected="ranges that never decrease from row to row",
            found=f"a decrease at row {int((ranges.diff() < 0).any(0).nonzero()[0]) + 1}",
            remedy="sort the tokens so that what rows see is in order; masks of another kind cannot be expressed",
        )
