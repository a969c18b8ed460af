"""The operators: what each computes, which inputs it accepts, and which implementation runs.

Kernels are chosen here and nowhere else, by device and by what is installed (`implementation`), never by a silent
fallback: what the chosen implementation cannot do raises.
"""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from triton_sp.errors import InputError
from triton_sp.ops import dispatch, reference

UNLIMITED = 1 << 30  # a reach of the mask beyond any segment, as in kernels/launch.py


@overload
def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    key_ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    key_ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    key_ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed tokens, each segment by itself.

    Args:
        q_THD: queries (T, H, D), with any strides. One that is not contiguous along D is copied.
        k_TKD, v_TKD: keys and values (T_k, K, D) with H a multiple of K, in the dtype of q.
        cu_seqlens_q: int32 or int64 (segments + 1,), on the device of q: where each segment starts, and the end of the
            last. Equal neighbours are empty segments; tokens past the last entry belong to none.
        cu_seqlens_k: the same for keys; None if equal.
        seqused_k: int32 or int64 (segments,), how many keys of each segment count; None for all of them.
        key_ranges: int32 or int64 (2, T), the keys that each row sees: of `k_TKD`, from key_ranges[0] up to, not
            including, key_ranges[1]; of these, the ones in its own segment. Both never decrease from row to row. They
            take the place of `causal` and `window`, for masks in which a block of tokens sees all of itself: the prefix
            of PaliGemma (arXiv:2407.07726), the images of Gemma 3 (arXiv:2503.19786).
        causal: a row sees the keys up to its own position, the last row aligned with the last key that counts.
        window: a row sees this many keys, its own included, behind it (and ahead of it, if not causal).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        scale: factor of the scores, above 0; None for 1 / sqrt(D).
        deterministic: gradients equal bit for bit from run to run. They are either way: no kernel here uses atomics.
        return_lse: also return the natural logarithm of each row's sum of exponentials.

    Returns:
        (T, H, D) in the dtype of q. Rows without a key, and rows past cu_seqlens_q[-1], are 0. With `return_lse` also
        (T, H) in fp32, -inf for such rows; both are differentiable. Under autocast, as for PyTorch's own attention,
        inputs are converted to its dtype.

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit; and cu_seqlens that do not start at 0, decrease
            or end past the tokens. Their values are looked at where that is free, on the CPU; on a GPU it would wait
            for the device, so there only if TRITON_SP_DEBUG=1, and unchecked ones never make a kernel read or write
            outside its tensors.
        UnsupportedKernelError: a head dim or dtype that the kernels of this device do not exist for. They exist for
            64, 72, 80, 88, 96, 128, 256 in bf16, fp16 and fp32; the reference takes any.

    >>> import torch
    >>> v = torch.tensor([1.0, 3.0, 10.0]).view(3, 1, 1).expand(3, 1, 64)
    >>> q = torch.zeros(3, 1, 64)
    >>> varlen_attention(q, q, v, torch.tensor([0, 2, 3]))[:, 0, 0].tolist()
    [2.0, 2.0, 10.0]
    >>> varlen_attention(q, q, v, torch.tensor([0, 2, 3]), causal=True)[:, 0, 0].tolist()
    [1.0, 2.0, 10.0]
    >>> prefix = torch.tensor([[0, 0, 0], [2, 2, 3]])  # the first two tokens see one another, the third sees all
    >>> varlen_attention(q, q, v, torch.tensor([0, 3]), key_ranges=prefix)[:2, 0, 0].tolist()
    [2.0, 2.0]
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, seqused_k, window, softcap, scale)
    _check_ranges(key_ranges, q_THD, causal, window)
    device = q_THD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_THD, k_TKD, v_TKD = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q_THD, k_TKD, v_TKD))
    factor = q_THD.shape[-1] ** -0.5 if scale is None else scale
    if dispatch.portable(q_THD.device) == "reference":
        _check_values(q_THD, k_TKD, cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges)
        with torch.autocast(device, enabled=False):
            out, lse_TH = reference.varlen_attention(
                q_THD,
                k_TKD,
                v_TKD,
                cu_seqlens_q.tolist(),
                cu_seqlens_k.tolist(),
                None if seqused_k is None else seqused_k.tolist(),
                key_ranges,
                causal=causal,
                window=window,
                softcap=softcap or 0.0,
                scale=factor,
                exact=return_lse,
            )
        return (out, lse_TH) if lse_TH is not None else out
    left = UNLIMITED if window is None else window - 1
    out, lse_HT = attend(
        *(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges),
        *(factor, softcap or 0.0, left, 0 if causal else left),
    )
    return (out, lse_HT.transpose(0, 1)) if return_lse else out


@torch.library.custom_op("triton_sp::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    key_ranges: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """The Triton kernels as one op: out (T, H, D) and the log-sum-exp (H, T). A row sees `left` keys behind its own
    position and `right` ahead, or its key range where these are given."""
    from triton_sp.kernels import attend as kernel  # here, so that the package imports without Triton

    _check_values(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges)
    if dispatch.implementation(q.device) == "gluon" and key_ranges is None:
        from triton_sp.kernels.hopper import attend as gluon

        if gluon.takes(q, k, v, seqused_k, softcap=softcap, left=left, right=right):
            return gluon.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, right=right)
    return kernel.forward(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges),
        scale=scale,
        softcap=softcap,
        left=left,
        right=right,
    )


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("triton_sp::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    key_ranges: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `attend`."""
    from triton_sp.kernels import attend_backward as kernel

    return kernel.backward(
        *(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges),
        scale=scale,
        softcap=softcap,
        left=left,
        right=right,
    )


@attend_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # mostly the log-sum-exp has no gradient: no zeros for it
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.settings = inputs[7:]


def _attend_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *where = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *attend_backward(dout, dlse, q, k, v, out, lse, *where, *ctx.settings), *(None,) * 8


attend.register_autograd(_attend_backward, setup_context=_setup_attend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> None:
    """Everything that can be seen without reading the values of a tensor."""
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or v.shape[:2] != k.shape[:2] or v.ndim != 3 or q.shape[2] != k.shape[2]:
        raise InputError(
            "q, k, v",
            expected="(T, H, D), (T_k, K, D), (T_k, K, D)",
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
    segments = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q.ndim == 1 else -1
    for name, table, size in (
        ("cu_seqlens_q", cu_seqlens_q, max(segments, 0) + 1),
        ("cu_seqlens_k", cu_seqlens_k, segments + 1),
        ("seqused_k", seqused_k, segments),
    ):
        if table is None:
            continue
        if table.dtype not in (torch.int32, torch.int64) or tuple(table.shape) != (size,) or table.device != q.device:
            raise InputError(
                name,
                expected=f"int32 or int64 of shape ({size},) on {q.device}",
                found=f"{table.dtype} of shape {tuple(table.shape)} on {table.device}",
                remedy="pass one more entry than segments, starting with 0 (seqused_k: one for each segment)",
            )
    for name, value, low in (("window", window, 1), ("softcap", softcap, 0.0)):
        if value is not None and value < low:
            raise InputError(
                name, expected=f"None or at least {low}", found=str(value), remedy="pass None for no limit"
            )
    if scale is not None and scale <= 0:
        raise InputError("scale", expected="a factor above 0", found=str(scale), remedy="put a sign into q or k")


def _check_ranges(key_ranges: Tensor | None, q: Tensor, causal: bool, window: int | None) -> None:
    if key_ranges is None:
        return
    if causal or window is not None:
        raise InputError(
            "key_ranges",
            expected="neither causal nor window beside them",
            found=f"causal={causal}, window={window}",
            remedy="put both into the ranges",
        )
    fits = key_ranges.dtype in (torch.int32, torch.int64) and tuple(key_ranges.shape) == (2, q.shape[0])
    if not fits or key_ranges.device != q.device:
        raise InputError(
            "key_ranges",
            expected=f"int32 or int64 of shape (2, {q.shape[0]}) on {q.device}",
            found=f"{key_ranges.dtype} of shape {tuple(key_ranges.shape)} on {key_ranges.device}",
            remedy="give the first key of each row, and the one past its last",
        )


def _check_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    key_ranges: Tensor | None,
) -> None:
    if not cu_seqlens_q.is_cpu and os.environ.get("TRITON_SP_DEBUG") != "1":
        return
    for name, table, total in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        steps = table.diff()
        if int(table[0]) != 0 or bool((steps < 0).any()) or int(table[-1]) > total:
            raise InputError(
                name,
                expected=f"entries that start at 0, never decrease and end by {total}",
                found=str(table.tolist()),
                remedy="pass the cumulated lengths of the segments",
            )
    if seqused_k is not None and bool(((seqused_k < 0) | (seqused_k > cu_seqlens_k.diff())).any()):
        raise InputError(
            "seqused_k",
            expected="no more keys than the segment has",
            found=f"{seqused_k.tolist()} of {cu_seqlens_k.diff().tolist()}",
            remedy="count keys from the start of each segment",
        )
    if key_ranges is not None and bool((key_ranges.diff() < 0).any()):
        raise InputError(
            "key_ranges",
            expected="ranges that never decrease from row to row",
            found=f"a decrease at row {int((key_ranges.diff() < 0).any(0).nonzero()[0]) + 1}",
            remedy="sort the tokens so that what rows see is in order; masks of another kind cannot be expressed",
        )
