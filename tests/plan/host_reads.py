"""How often a stack of layers asks the device for values, counted by where the questions come from."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from triton_sp import stages
from triton_sp.ops import varlen
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import resolve_group

QUESTIONS = {"tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"}


class CountReads(TorchFunctionMode):
    """The questions of our own modules, but not of reference.py: that is what runs where there is no device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in QUESTIONS:
            frame = sys._getframe(1)
            while frame is not None and frame.f_globals.get("__name__", "").startswith("torch"):
                frame = frame.f_back
            module = frame.f_globals["__name__"] if frame else ""
            self.found[f"{module.rsplit('.', 1)[-1]}.{name}"] += 1
        return func(*args, **(kwargs or {}))


def count(heads: int, kv_heads: int, plan: str, layers: int) -> dict[str, int]:
    """Of `layers` layers of a causal stream whose segments only the device knows, forward and backward."""
    group = resolve_group()
    cu_seqlens = torch.tensor([0, 20, 40, 64], dtype=torch.int32)
    shards = Shards((40, 24)) if plan == "segments" else shard_tokens(64, group.size)
    stream = Stream(group, shards, cu_seqlens, plan=plan)
    x = torch.randn(shards.sizes[group.rank], heads, 4, requires_grad=True)
    # The kernels ask nothing.
    lse = torch.zeros(heads, 64)
    nothing = {
        "forward": lambda q, *_, **__: (q.contiguous(), lse[: q.shape[1], : len(q)]),
        "backward": lambda *_, grads, **__: [grad.zero_() for grad in grads],
        "attend_eagerly": lambda states, *_, **__: states[0] + (states[1].sum() + states[2].sum()) * 0,
    }
    with mock.patch.multiple(varlen, **nothing), CountReads() as reads:
        out = x
        for _ in range(layers):
            kv = out[:, :kv_heads]
            out = stages.attention((out, kv, kv), stream, causal=True)
        out.sum().backward()
    # The twins of pack and unpack read their tables, where the kernels are handed them.
    return {name: number for name, number in reads.found.items() if not name.startswith("pack")}
