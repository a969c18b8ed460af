"""The way of the data, in order. Everything else installs, plans or speeds up what stands here.

    shard      each rank keeps its contiguous part of a token stream, and runs all token-wise layers on it
    pack       an attention layer sorts its local q, k, v by the rank that will attend with those heads
    exchange   one all-to-all: local tokens of all heads become all tokens of the local heads
    attend     varlen attention inside each segment of the stream, no padding
    exchange   one all-to-all back: all heads of the local tokens
    unpack     the heads in their order
    fuse       the vision stream's features become tokens of the text stream
    loss       each rank its tokens' share; the sum over ranks is the batch's loss

Shape letters: T local tokens, S tokens of the whole stream, H heads, K key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triton_sp import comm, ops
from triton_sp.comm import Group
from triton_sp.plan import HeadShares, Shards, share_heads


@dataclass(frozen=True, eq=False)
class Stream:
    """One token stream of one batch, as every rank of the group sees it. Immutable, so that a recomputation in the
    backward reads what the forward read.

    Attributes:
        cu_seqlens: int32 (segments + 1,), the segments of the whole stream.
        seqused_k: int32 (segments,), or None where every token of a segment is a key of it. A padding position that
            carries a label is a segment of one row and no key.
    """

    group: Group
    shards: Shards
    cu_seqlens: Tensor
    seqused_k: Tensor | None = None

    @property
    def local(self) -> slice:
        own = self.shards.range(self.group.rank)
        return slice(own.start, own.stop)


def shard(x: Tensor, stream: Stream, dim: int = 0) -> Tensor:
    """This rank's tokens of a tensor whose `dim` is the whole stream. The adjoint of a slice is zero padding."""
    own = stream.shards.range(stream.group.rank)
    return x.narrow(dim, own.start, len(own))


def pack(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, shares: HeadShares) -> Tensor:
    """The send buffer: for each rank in order (T, its q heads + k heads + v heads, D), flattened.

    >>> q = torch.tensor([[0., 1.], [2., 3.]]).unsqueeze(-1)          # 2 tokens, 2 heads, D = 1
    >>> pack(q, q + 10, q + 20, share_heads(2, 2, 2)).tolist()
    [0.0, 10.0, 20.0, 2.0, 12.0, 22.0, 1.0, 11.0, 21.0, 3.0, 13.0, 23.0]
    """
    parts = []
    for q_heads, kv_heads in zip(shares.q, shares.kv, strict=True):
        kv = slice(kv_heads.start, kv_heads.stop)
        parts.append(torch.cat([q_THD[:, q_heads.start : q_heads.stop], k_TKD[:, kv], v_TKD[:, kv]], 1).flatten())
    return torch.cat(parts)


def unpack(received: Tensor, tokens: int, shares: HeadShares, head_dim: int) -> Tensor:
    """(T, H, D) from the receive buffer of the second exchange: each rank's heads of the local tokens, in rank order.

    >>> unpack(torch.tensor([0., 2., 1., 3.]), 2, share_heads(2, 2, 2), 1).squeeze(-1).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    sizes = [tokens * len(heads) * head_dim for heads in shares.q]
    parts = received.split(sizes)
    return torch.cat(
        [part.view(tokens, len(heads), head_dim) for part, heads in zip(parts, shares.q, strict=True)], 1
    )


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    stream: Stream,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over the whole stream from this rank's tokens: two exchanges, a fair share of the heads each.

    Args:
        q_THD, k_TKD, v_TKD: this rank's tokens, all heads; position embeddings applied.

    Returns:
        (T, H, D), this rank's tokens, all heads.
    """
    group, shards = stream.group, stream.shards
    (tokens, num_heads, head_dim), num_kv_heads = q_THD.shape, k_TKD.shape[1]
    shares = share_heads(num_heads, num_kv_heads, group.size)
    own_q, own_kv, own_packed = len(shares.q[group.rank]), len(shares.kv[group.rank]), shares.packed(group.rank)

    send = [tokens * shares.packed(rank) * head_dim for rank in range(group.size)]
    receive = [size * own_packed * head_dim for size in shards.sizes]
    # Sources arrive in rank order and shards are contiguous, so the receive buffer already is the stream in order.
    buffer = comm.exchange(pack(q_THD, k_TKD, v_TKD, shares), send, receive, group)
    q, k, v = buffer.view(shards.total, own_packed, head_dim).split([own_q, own_kv, own_kv], 1)

    out = ops.varlen_attention(
        q, k, v, stream.cu_seqlens, seqused_k=stream.seqused_k, causal=causal, window=window, softcap=softcap, scale=scale
    )

    send = [size * own_q * head_dim for size in shards.sizes]
    receive = [tokens * len(heads) * head_dim for heads in shares.q]
    return unpack(comm.exchange(out.flatten(), send, receive, group), tokens, shares, head_dim)


def gather(x: Tensor, stream: Stream, unit: int = 1) -> Tensor:
    """The whole stream from this rank's tokens (dim 0), `unit` of which have become one row."""
    return comm.gather(x, stream.shards.merged(unit), stream.group)
