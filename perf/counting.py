"""What a rank does in a step, counted at the same places for every engine: collectives where torch.distributed is
called, attention where scaled_dot_product_attention is, each by standing in front of the function."""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol

from triton_sp.ops import attend_cpu
from triton_sp.ranks import collectives


@dataclass
class Tally:
    """What a rank did: collectives by name, those inside attention modules, bytes to other ranks, attention FLOPs."""

    collectives: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    flops: int = 0
    depth: int = 0

    def collective(self, name: str, arguments: dict[str, Any]) -> None:
        self.collectives[name] += 1
        self.inside[name] += self.depth > 0
        x = next(arguments[key] for key in ("input", "self", "tensor", "input_tensor") if key in arguments)
        ranks, size = dist.get_world_size(), x.numel() * x.element_size()
        if name == "all_to_all_single":  # all but the part for this rank itself
            splits = arguments.get("input_split_sizes")
            self.sent += size - (size * splits[dist.get_rank()] // max(sum(splits), 1) if splits else size // ranks)
        else:  # a gather sends what a rank has to each other rank; a reduction is counted as its payload, once
            self.sent += size * (ranks - 1) if "gather" in name else size

    def attention(self, query: Tensor, key: Tensor, causal: bool) -> None:
        """Two products over the pairs of a row and a key that the mask lets through."""
        *heads, rows, dim = query.shape
        pairs = rows * (rows + 1) // 2 if causal else rows * key.shape[-2]
        self.flops += 4 * math.prod(heads) * pairs * dim


@contextmanager
def counted(model: nn.Module | None = None) -> Iterator[Tally]:
    """Count what runs inside, the backward too. Modules of `model` named self_attn are the attention layers."""
    tally = Tally()

    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            tally.collective(original.__name__, signature.bind(*args, **kwargs).arguments)
            return original(*args, **kwargs)

        return call

    attend = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tally.attention(query, key, kwargs.get("is_causal", False))
        return attend(query, key, *args, **kwargs)

    on_cpu = attend_cpu._FLASH

    def sharded_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, **scale: Any) -> Any:
        tally.attention(query, key, causal)
        return on_cpu(query, key, value, dropout, causal, **scale)

    def step(change: int) -> Callable[..., None]:
        return lambda *_: setattr(tally, "depth", tally.depth + change)

    names = ["all_to_all_single", "all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"]
    doors = [(dist, name) for name in names]
    doors += [(funcol, "all_gather_tensor"), (funcol, "all_reduce"), (collectives, "all_to_all_single")]
    patches = [mock.patch.object(place, name, stand_in(getattr(place, name))) for place, name in doors]
    patches.append(mock.patch.object(F, "scaled_dot_product_attention", attention))
    patches.append(mock.patch.object(attend_cpu, "_FLASH", sharded_attention))
    modules = model.named_modules() if model is not None else ()
    blocks = [module for name, module in modules if name.endswith("self_attn")]
    hooks = [block.register_forward_pre_hook(step(1)) for block in blocks]
    hooks += [block.register_forward_hook(step(-1)) for block in blocks]
    for patch in patches:
        patch.start()
    try:
        yield tally
    finally:
        for undo in (*(patch.stop for patch in patches), *(hook.remove for hook in hooks)):
            undo()


def listed(counts: Counter[str], per: int = 1) -> str:
    """What was counted, in words.

    >>> listed(Counter(all_reduce=1, all_gather=4), per=2), listed(Counter())
    ('2 all_gather + 0.5 all_reduce', '0')
    """
    return " + ".join(f"{count / per:g} {name}" for name, count in sorted(counts.items()) if count) or "0"
