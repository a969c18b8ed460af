"""One layer as the host sees it: which kernels are launched, which collectives run, and that nothing is copied between.

Launches and exchanges are replaced by stubs, so one process plays any rank of any group; the values mean nothing here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from perf import host
from perf.cases import AttentionCase

FORWARD = {"attend_forward": 1}
BACKWARD = {"attend_dq": 1, "attend_dkv": 1}
# Operators that make a tensor without writing one, or another view of it.
FREE = {
    *("empty", "empty_like", "new_empty", "empty_strided", "detach", "view", "_unsafe_view", "alias", "slice"),
    *("split_with_sizes", "split", "transpose", "unsqueeze", "as_strided", "select", "expand", "unbind"),
}


class Operators(TorchDispatchMode):
    """Counts the operators that write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.written[name] += 1
        return func(*args, **(kwargs or {}))


def states(case: AttentionCase) -> list[torch.Tensor]:
    heads = (case.heads, case.kv_heads, case.kv_heads)
    return [torch.randn(host.TOKENS, h, case.dim, requires_grad=True) for h in heads]


@pytest.mark.parametrize(
    ("case", "ranks", "plan", "around"),
    [
        (host.CASES[0], 8, "heads", {"pack_heads": 1, "unpack_heads": 1}),
        (host.CASES[1], 2, "heads", {"pack_heads": 1, "unpack_heads": 1}),
        (host.CASES[2], 8, "heads", {"pack_heads": 1, "unpack_heads": 1}),
        (host.CASES[0], 8, "segments", {}),
        (host.CASES[2], 1, "heads", {}),
    ],
)
def test_launches_of_a_layer_and_no_copies(case, ranks: int, plan: str, around: dict[str, int]) -> None:
    """Where heads divide: one launch to pack q, k and v, one to attend, one to unpack; backward as many and one more.
    dq, dk and dv are written to the buffer that travels."""
    q, k, v = states(case)
    gradient = torch.randn(host.TOKENS, case.heads, case.dim)
    with host.alone_among(ranks, 0), host.without_launches() as launched:
        layer = host.sharded(case, ranks, plan)
        layer(q, k, v)  # tables are made once a stream
        launched.clear()
        with Operators() as operators:
            out = layer(q, k, v)
        assert launched == FORWARD | around and not operators.written
        launched.clear()
        with Operators() as operators:
            torch.autograd.grad(out, (q, k, v), gradient)
        parts = {"add_heads": 2} if case.heads != case.kv_heads else {}  # dk and dv of each query head
        assert launched == BACKWARD | parts | around and not operators.written
