"""The operator that stands for attention in graphs of torch.compile is `stages.attention`, bit for bit; whole models
under torch.compile are in tests/engines/test_torch_compile.py."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_sp import stages
from triton_sp.errors import UnsupportedModelError
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import resolve_group
from triton_sp.wrappers import graphs
from triton_sp.wrappers.scope import AttentionScope

STARTS = (0, 9, 20, 31)
SCALE = 0.4


def with_a_row(x: Tensor) -> Tensor:
    """What attention is given on a rank without tokens."""
    return x if len(x) else F.pad(x, (0, 0, 0, 0, 0, 1))


def differences(plan: str, learned: bool) -> dict[str, int]:
    """Of the output and each gradient whether the operator's is another; on 3 ranks, of which the last has no token."""
    group, shards = resolve_group(), Shards((20, 11, 0))
    stream = Stream(group, shards, torch.tensor(STARTS), host_segments=Segments(STARTS), plan=plan)  # type: ignore[arg-type]
    scope = AttentionScope(stream).traceable()
    generator = torch.Generator().manual_seed(group.rank)
    shapes = [(6, 5), (3, 5), (3, 4), (6, 4)]
    *states, dout = (
        torch.randn(len(stream.own), *shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    )
    sinks = [torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()] if learned else []
    factors = {"causal": True, "softmax_scale": SCALE, "sinks": sinks[0] if sinks else None}
    out = stages.attention(tuple(states), stream, **factors)  # type: ignore[arg-type]
    expected = [out, *torch.autograd.grad(out, [*states, *sinks], dout)]

    widened = [with_a_row(x) for x in states]
    local = scope.local[None]
    assert local == (plan == "segments") and scope.handle is not None
    found, _, _ = graphs.sharded_attention(widened + sinks, scope.handle, None, local, True, None, 0.0, SCALE)
    assert len(found) == max(len(out), 1) and scope.tally["attention"] == 1
    gradients = torch.autograd.grad(found, [*states, *sinks], with_a_row(dout))
    pairs = zip(("out", "q", "k", "v", "sinks"), expected, [found[: len(out)], *gradients], strict=False)
    return {name: int(not torch.equal(a, b)) for name, a, b in pairs}


@pytest.mark.parametrize("plan", ["heads", "segments"])
@pytest.mark.parametrize("learned", [True, False])
def test_operator(ranks, plan: str, learned: bool) -> None:
    for found in ranks.run(differences, plan, learned, ranks=3):
        assert len(found) == 4 + learned and not any(found.values()), found


def test_what_a_number_stands_for() -> None:
    """It lives as long as the number, and a copy of the number does not keep it."""
    handle = graphs.hold(things := {"a thing"})
    copied = handle.clone()
    assert graphs.held(handle) is things and graphs.held(copied) is things
    del handle, things
    gc.collect()
    with pytest.raises(UnsupportedModelError, match="copies"):
        graphs.held(copied)
