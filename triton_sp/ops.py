"""The operators: what each computes, which inputs it accepts, and which implementation runs.

Kernels are chosen here and nowhere else, by device and by `available()`, never by a silent fallback.
"""

from __future__ import annotations

from torch import Tensor

from triton_sp import reference
from triton_sp.errors import InputError


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention of packed tokens, each segment by itself.

    Args:
        q_THD: queries (T, H, D).
        k_TKD, v_TKD: keys and values (T_k, K, D) with H a multiple of K.
        cu_seqlens_q: int32 (segments + 1,), where each segment starts, and the end of the last.
        cu_seqlens_k: the same for keys; None if equal.
        seqused_k: int32 (segments,), how many keys of each segment count; None for all of them.
        causal: a row sees the keys up to its own position, the last row aligned with the last key.
        window: a row sees this many keys, its own included, behind it (and ahead of it, if not causal).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        scale: factor of the scores; None for 1 / sqrt(D).
        deterministic: gradients equal bit for bit from run to run.

    Returns:
        (T, H, D) in the dtype of q. Rows without a key, and rows past cu_seqlens_q[-1], are 0.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.

    >>> import torch
    >>> v = torch.tensor([1.0, 3.0, 10.0]).view(3, 1, 1)
    >>> varlen_attention(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), v, torch.tensor([0, 2, 3])).flatten().tolist()
    [2.0, 2.0, 10.0]
    """
    if q_THD.ndim != 3 or k_TKD.ndim != 3 or v_TKD.shape[:2] != k_TKD.shape[:2]:
        raise InputError(
            "q, k, v",
            expected="(T, H, D), (T_k, K, D), (T_k, K, D)",
            found=f"{tuple(q_THD.shape)}, {tuple(k_TKD.shape)}, {tuple(v_TKD.shape)}",
            remedy="pack the tokens of the batch into one stream",
        )
    starts_q = cu_seqlens_q.tolist()
    out, _ = reference.varlen_attention(
        q_THD,
        k_TKD,
        v_TKD,
        starts_q,
        starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist(),
        None if seqused_k is None else seqused_k.tolist(),
        causal=causal,
        window=window,
        softcap=softcap or 0.0,
        scale=q_THD.shape[-1] ** -0.5 if scale is None else scale,
        exact=False,
    )
    return out
