"""Calls of `scaled_dot_product_attention` inside other people's modules, head-sharded.

A module runs on this rank's tokens. In its call q, k and v of these tokens go in, and out comes the result of attending
to the whole stream. torch's own MultiheadAttention gets there too, if it is kept from its fused path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from triton_sp import stages
from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.stream import Stream
from triton_sp.wrappers.lookups import with_globals
from triton_sp.wrappers.towers.hidden import HiddenShape, SequencesShape

if TYPE_CHECKING:
    from triton_sp.wrappers.proof.verification import Proof


@dataclass(frozen=True, eq=False)
class OpaqueScope:
    """The scope of a module with opaque attention that runs on this rank's tokens.

    Attributes:
        method: HEADS or GATHERED.
        stream: all tokens.
        layout: the shape of the hidden states of all tokens, and of a rank's.
        dry: nothing is sent and the values mean nothing, to find out whether a method runs at all.
        proof: verifies this module's attention, or None.
        tally: counts the attention calls that came by.
    """

    method: str
    stream: Stream
    layout: HiddenShape | SequencesShape
    dry: bool = False
    proof: Proof | None = None
    tally: Counter[str] = field(default_factory=Counter)

    @cached_property
    def shape(self) -> torch.Size:
        """This rank's hidden states without their channels."""
        return self.own(torch.empty(self.layout.shape, device="meta")).shape[:-1]

    def gather(self, local: Tensor) -> Tensor:
        """The hidden states of all tokens, from this rank's."""
        if self.dry:
            return local.new_zeros(*self.layout.shape[:-1], local.shape[-1])
        return self.layout.restore(stages.gather(self.layout.rows(local), self.stream))

    def own(self, x: Tensor) -> Tensor:
        """This rank's hidden states, from those of all tokens."""
        return self.layout.local(stages.shard(self.layout.flat(x), self.stream))


class ShardSDPA(TorchFunctionMode):
    """Replaces calls of scaled_dot_product_attention on the rank's tokens."""

    def __init__(self, scope: OpaqueScope) -> None:
        super().__init__()
        self.attend = partial(_sharded_sdpa, scope)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self.attend
        elif func is F.multi_head_attention_forward:
            # torch switches the mode off inside its own functions, so this one is run with our attention in place
            # of the global name that it looks up; the function itself is not touched.
            names = {"scaled_dot_product_attention": self.attend, "has_torch_function": lambda _: False}
            func = with_globals(func, names)
        return func(*args, **(kwargs or {}))


def _sharded_sdpa(
    scope: OpaqueScope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA's signature: (B, H, T, D), or (H, T, D) without a batch."""
    if dropout_p:
        raise UnsupportedModelError(
            "scaled_dot_product_attention",
            expected="attention without dropout",
            found=f"dropout_p={dropout_p}",
            remedy="set the attention's dropout to 0, or train with model.eval() around it",
        )
    if query.ndim == 3:
        return _sharded_sdpa(scope, query[None], key[None], value[None], attn_mask, 0.0, is_causal, scale)[0]
    tokens = len(scope.stream.own)
    rows = scope.shape.numel() // tokens if tokens else query.shape[0]
    fits = query.ndim == 4 and query.shape[0] == rows and query.shape[2] == key.shape[2] == tokens
    if not fits or attn_mask is not None:
        raise UnsupportedModelError(
            "scaled_dot_product_attention",
            expected=f"q, k, v of shape ({rows}, heads, {tokens}, head_dim) and no mask",
            found=f"q {tuple(query.shape)}, {'no mask' if attn_mask is None else f'a mask {tuple(attn_mask.shape)}'}",
            remedy="keep attention on (batch, heads, tokens, head_dim) and express masks as separate images",
        )
    scope.tally["sdpa"] += 1
    if scope.dry:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    # Rows that share their tokens' positions are as independent as heads are, so they are treated as more heads.
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (query, key, value))
    attend = stages.attention if scope.proof is None else scope.proof.attend
    out = attend((q, k, v), scope.stream, causal=is_causal, softmax_scale=scale)
    return out.transpose(0, 1).unflatten(0, query.shape[:2])


@contextmanager
def no_fast_path() -> Iterator[None]:
    """torch's fused inference path of MultiheadAttention does not call scaled_dot_product_attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
