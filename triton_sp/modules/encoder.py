"""Modules for people with their own model script: a sharded stack of blocks, and sharded attention alone.

`triton_sp.wrap` finds the parts of a model by itself; these are for a model that it cannot read, or of which only a
part is to be sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.find import opaque_stack
from triton_sp.anatomy.parts import Anatomy
from triton_sp.config import SPConfig
from triton_sp.errors import DisagreementError, InputError
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives, groups
from triton_sp.wrappers import entry
from triton_sp.wrappers.install import Installation, attach
from triton_sp.wrappers.plain.opaque import run_in, same_tokens
from triton_sp.wrappers.plain.sdpa import OpaqueScope
from triton_sp.wrappers.plain.trial import find_method, random_states
from triton_sp.wrappers.towers import vision
from triton_sp.wrappers.towers.hidden import SequencesShape


class ShardedEncoder(nn.Module):
    """Blocks that run one after another, each rank on its part of the tokens.

    Every rank of the group calls it with the same whole hidden states and gets the same whole result. In between no
    rank holds more than its part of the tokens (blocks that multiply queries and keys themselves excepted, see
    `triton_sp.explain`). What the ranks then compute of the result must be the same on all of them; gradients are
    combined as `SPConfig.gradient` says, `triton_sp.sync_gradients(model)` does it for this module alone.

    Args:
        blocks: modules that take hidden states (B, N, C) first and return them. Tokens may meet in attention only:
            the first call tries that out, and raises UnsupportedModelError otherwise.
        group: as for `triton_sp.wrap`.
        config: as for `triton_sp.wrap`.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> encoder = ShardedEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
    >>> encoder(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    >>> dist.destroy_process_group()
    """

    def __init__(self, blocks: Iterable[nn.Module], group: Any = None, config: SPConfig | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise InputError("blocks", expected="at least one module", found="none", remedy="pass the model's blocks")
        stack = opaque_stack("blocks", self, list(self.blocks))
        if stack.refusal is not None:
            raise stack.refusal
        installation = Installation(groups.resolve_group(group), config or SPConfig(), Anatomy(self, [stack], None, []))
        if not installation.idle:
            vision.install(stack, installation)
            installation.override(self, entry.run_model)
        attach(self, installation)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (B, N, C) of all tokens to those after the last block; the rest goes to each block."""
        for block in self.blocks:
            out = block(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


class ShardedAttention(nn.Module):
    """Attention of a sequence whose tokens the ranks hold in parts: this rank's tokens in, this rank's tokens out.

    Parts follow one another in rank order and may differ in size. The backward sends every rank the gradient of its
    tokens; a parameter's gradient is this rank's share of it, and the sum over the ranks is the whole.

    Args:
        attention: a module that takes hidden states (B, N, C) first and returns (B, N, C), or a tuple that begins
            with it; nn.MultiheadAttention(batch_first=True) too, as self-attention. If it calls
            `scaled_dot_product_attention` its heads are exchanged, otherwise it runs on gathered tokens; `method`
            says which, once it was called.
        group: as for `triton_sp.wrap`.

    Raises:
        DisagreementError: ranks differ in the number of sequences or channels.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> class Attention(nn.Module):
    ...     def forward(self, x):
    ...         heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    ...         return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    >>> attention = ShardedAttention(Attention())
    >>> local = torch.randn(3, 5, 8)      # of each rank its own tokens: 3 sequences, 5 tokens of each on this rank
    >>> attention(local).shape
    torch.Size([3, 5, 8])
    >>> dist.destroy_process_group()
    """

    method: str | None = None

    def __init__(self, attention: nn.Module, group: Any = None) -> None:
        super().__init__()
        self.attn = attention
        self.group = groups.resolve_group(group)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """This rank's tokens (B, T, C) to this rank's tokens; the rest is handed to the attention module as it is."""
        if hidden.ndim != 3:
            raise InputError(
                "hidden", expected="(B, T, C)", found=f"{tuple(hidden.shape)}", remedy="add the batch axis"
            )
        group = self.group
        if isinstance(self.attn, nn.MultiheadAttention):
            kwargs["need_weights"] = False  # weights would make it multiply matrices itself

        def run(scope: OpaqueScope | None, states: Tensor) -> Any:
            given = (states,) * 3 if isinstance(self.attn, nn.MultiheadAttention) else (states,)
            if scope is None:
                return self.attn(*given, *args, **kwargs)
            return run_in(scope, self.attn, *given, *args, **kwargs)

        if group.size == 1:
            return run(None, hidden)
        shards = self._shards(hidden)
        layout = SequencesShape(torch.Size((len(hidden), shards.total, hidden.shape[-1])))
        cu_seqlens = torch.tensor([0, shards.total], dtype=torch.int32, device=hidden.device)
        if self.method is None:
            cut = Stream(group, shard_tokens(shards.total, group.size), cu_seqlens)
            probe = random_states(layout.shape, hidden)
            self.method = find_method(
                self.attn, run, lambda method, dry: OpaqueScope(method, cut, layout, dry), probe, group
            )
        scope = OpaqueScope(self.method, Stream(group, shards, cu_seqlens), layout)
        return same_tokens(run(scope, hidden), scope, self.attn)

    def _shards(self, hidden: Tensor) -> Shards:
        """How many tokens each rank holds: one small message a call."""
        everyone = collectives.integers_of_all(hidden.shape, self.group)
        for rank, (rows, _, channels) in enumerate(everyone):
            if (rows, channels) != (len(hidden), hidden.shape[-1]):
                raise DisagreementError(
                    "hidden",
                    expected=f"{len(hidden)} sequences and {hidden.shape[-1]} channels, as on this rank",
                    found=f"{rows} and {channels} on rank {rank}",
                    remedy="give every rank tokens of the same sequences",
                    rank=self.group.rank,
                )
        return Shards(tuple(tokens for _, tokens, _ in everyone))


class UlyssesSPViTAttention(ShardedAttention):
    """ShardedAttention under the name and signature that DeepSpeed's AutoSP has for it (PR #7984), with its way of
    treating a CLS token: every rank holds it in front of its patches, and gets it back.

    Differs from it where ShardedAttention does: gradients are exact, and heads are exchanged where possible. The CLS
    token counts as rank 0's: on the others it takes part with what rank 0 made of it, and its input gets no gradient.

    Args:
        attn, process_group: as for ShardedAttention.
        has_cls_token: whether hidden states (B, 1 + T, C) begin with a CLS token, equal on all ranks.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> attention = UlyssesSPViTAttention(nn.MultiheadAttention(8, 2, batch_first=True), None, has_cls_token=True)
    >>> attention(torch.randn(3, 1 + 5, 8))[0].shape
    torch.Size([3, 6, 8])
    >>> dist.destroy_process_group()
    """

    def __init__(self, attn: nn.Module, process_group: Any = None, has_cls_token: bool = True) -> None:
        super().__init__(attn, process_group)
        self.has_cls_token = has_cls_token

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """This rank's tokens (B, T, C) or (B, 1 + T, C) to the same; what else the module returns comes after it."""
        if not self.has_cls_token or self.group.size == 1:
            return super().forward(hidden_states, *args, **kwargs)
        first = int(self.group.rank == 0)
        out = super().forward(hidden_states if first else hidden_states[:, 1:], *args, **kwargs)
        local, *rest = out if isinstance(out, tuple) else (out,)
        owners = Shards((len(local), *[0] * (self.group.size - 1)))
        cls = collectives.gather(local[:, 0] if first else local.flatten(0, 1)[:0], owners.sizes, self.group)
        local = torch.cat([cls[:, None], local[:, first:]], 1)
        return (local, *rest) if isinstance(out, tuple) else local
