"""The trial of a plain module: whether it computes on shards what it computes on all tokens, and by which method.

The code of a module does not show that, so the module is run once both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.shards import Shards
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group

HEADS, GATHERED = "heads exchanged", "gather-compute-slice"

# run(scope, hidden states): on a shard, or with None the module's own forward on all tokens.
Run = Callable[[Any, Tensor], Any]


def find_method(module: nn.Module, run: Run, scopes: Callable[[str, bool], Any], probe: Tensor, group: Group) -> str:
    """Find out how a module can be sharded: HEADS if its SDPA calls can exchange heads, otherwise GATHERED.

    The module is run both ways, on shards and on all tokens. Hidden states and weights are random: weights that start
    at zero, or images that are all alike, would hide tokens that meet outside of attention. All ranks come to the same
    verdict.

    Args:
        scopes: the scope of a method, dry or not. Its shards are to cut through images.
        probe: random hidden states of all tokens, the same on every rank.

    Raises:
        UnsupportedModelError: neither method is right.
    """

    def everywhere(fine: bool) -> bool:
        return not collectives.all_reduce(torch.tensor([0.0 if fine else 1.0], device=probe.device), group).item()

    found = "another result on shards than on all tokens"
    with _trial_of(module, run) as call:
        expected = hidden_of(call(None, probe))
        for method in (HEADS, GATHERED):
            dry = scopes(method, True)
            try:
                call(dry, dry.own(probe))
                runs = method == GATHERED or dry.tally["sdpa"] > 0
            except Exception as error:  # a module of anybody's: whatever it raises, this method is not for it
                runs, found = False, f"{type(error).__name__} on a shard: {error}"
            if not everywhere(runs):
                continue
            scope = scopes(method, False)
            result, target = hidden_of(call(scope, scope.own(probe))), scope.own(expected)
            if everywhere(result.shape == target.shape and torch.allclose(result, target, rtol=1e-3, atol=1e-3)):
                return method
    raise UnsupportedModelError(
        type(module).__name__,
        expected="a block in which tokens meet in its attention modules only",
        found=found,
        remedy="wrap a model without it, or shard its attention alone by triton_sp.modules.encoder.ShardedAttention",
    )


class _Runner(nn.Module):
    """A module around a module, so that functional_call runs our function on it without its hooks and overrides."""

    def __init__(self, module: nn.Module, run: Run) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, scope: Any, hidden: Tensor) -> Any:
        return self.run(scope, hidden)


@contextmanager
def _trial_of(module: nn.Module, run: Run) -> Iterator[Run]:
    """The same function on a module with random weights, in float32 or wider, without dropout and gradients."""
    generator = torch.Generator().manual_seed(0)

    def weights(p: Tensor) -> Tensor:
        noise = torch.rand(p.shape, generator=generator) if p.ndim < 2 else torch.randn(p.shape, generator=generator)
        noise = noise + 0.5 if p.ndim < 2 else noise / p.shape[-1] ** 0.5
        return noise.to(p.device, torch.promote_types(p.dtype, torch.float32))

    random = {f"module.{n}": weights(p) for n, p in module.named_parameters() if p.is_floating_point()}
    runner, modes = _Runner(module, run), [(part, part.training) for part in module.modules()]
    module.eval()
    kind = next((p.device.type for p in module.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            yield lambda scope, hidden: torch.func.functional_call(runner, random, (scope, hidden))
    finally:
        for part, mode in modes:
            part.training = mode


def random_states(shape: torch.Size, like: Tensor) -> Tensor:
    """The same on every rank, in float32 or wider."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return noise.to(like.device, torch.promote_types(like.dtype, torch.float32))


def hidden_of(out: Any) -> Tensor:
    """The hidden states of what a block or an attention module returns."""
    return out[0] if isinstance(out, tuple) else out


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def shards_inside(total: int, length: int, ranks: int) -> Shards:
    """Nearly equal parts that are cut through images of `length` tokens wherever that is possible: cuts between images
    would not show whether a block mixes the tokens of one.

    >>> shards_inside(8, 4, 2).sizes, shards_inside(9, 9, 2).sizes
    ((6, 2), (4, 5))
    """
    cuts = [total * rank // ranks for rank in range(1, ranks)]
    cuts = [cut + length // 2 if 0 < cut < total and cut % length == 0 else cut for cut in cuts]
    edges = [0, *sorted(cuts), total]
    return Shards(tuple(stop - start for start, stop in pairwise(edges)))
