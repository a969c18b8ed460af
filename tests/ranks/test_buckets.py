"""The gradients of a step travel in buckets, whatever these gradients are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from triton_sp.ranks import collectives, groups

KINDS = [torch.float32, torch.float64, torch.bfloat16]


def sizes(parameters: list[nn.Parameter]) -> list[list[int]]:
    return [[p.numel() for p in bucket] for bucket in collectives._buckets(parameters)]


def test_buckets_are_of_one_dtype_in_order_and_not_too_large(monkeypatch) -> None:
    monkeypatch.setattr(collectives, "_BUCKET_BYTES", 40)
    shapes = [(6, 0), (3, 1), (4, 0), (1, 0), (30, 0), (2, 1), (1, 1), (9, 2)]  # numbers, and the kind of them
    parameters = [nn.Parameter(torch.zeros(count, dtype=KINDS[kind])) for count, kind in shapes]
    assert sizes(parameters) == [[6, 4], [1], [3, 2], [30], [1], [9]]
    assert sizes([]) == [] and collectives._BUCKET_BYTES == 40
    monkeypatch.undo()
    assert collectives._BUCKET_BYTES == 64 * 1024 * 1024 and sizes(parameters) == [[6, 4, 1, 30], [3, 2, 1], [9]]


def gradients() -> tuple[list[torch.Tensor | None], list[tuple[str, int]], list[int]]:
    """Of parameters of several kinds: used by all, by one rank, by none; as views, and not contiguous."""
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2, 3, dtype=KINDS[i % 2])) for i in range(6)]
    whole = torch.arange(60.0).view(6, 10) * (rank + 1)
    parameters[0].grad = whole[:2, :3]  # a view of something larger
    parameters[1].grad = whole[:3, 4:6].t().double()  # not contiguous
    parameters[2].grad = torch.full((2, 3), 7.0) if rank == 1 else None
    parameters[4].grad = whole[4:, 7:].clone()
    parameters[5].grad = torch.ones(2, 3, dtype=torch.float64) * rank
    # Not for good: the process is a rank of later tests too.
    with mock.patch.object(collectives, "_BUCKET_BYTES", 64), collectives.record() as ledger:
        collectives.all_reduce_gradients(parameters, groups.resolve_group(), 0.5)
        collectives.all_reduce_gradients([], groups.resolve_group(), 0.5)
    found = [p.grad for p in parameters]
    return found, ledger.entries, [0 if g is None else g.untyped_storage().nbytes() for g in found]


def test_gradients_of_all_kinds_are_summed(ranks) -> None:
    base = torch.arange(60.0).view(6, 10) * 1.5  # half of once and twice
    expected = [
        base[:2, :3], base[:3, 4:6].t().double(), torch.full((2, 3), 3.5), None, base[4:, 7:],
        torch.full((2, 3), 0.5).double(),
    ]  # fmt: skip
    for found, entries, kept in ranks.run(gradients, ranks=2):
        for grad, wanted in zip(found, expected, strict=True):
            assert (grad is None) == (wanted is None)
            assert grad is None or torch.equal(grad, wanted)
        # what ranks have, two buckets of floats (24 + 24 bytes and 24), and two of doubles (48 each)
        assert sorted(entries) == sorted([("all_reduce", 24), *[("all_reduce", size) for size in (48, 24, 48, 48)]])
        assert kept == [24, 48, 24, 0, 24, 48]  # no more than the gradient itself


def movements() -> list[object]:
    group, rank = groups.resolve_group(), dist.get_rank()
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    everyone = collectives.gather(x, [2, 2, 2], group)
    (everyone * (1 + rank) * torch.arange(1.0, 7.0)[:, None]).sum().backward()
    total = collectives.total_of_shares(x.detach().requires_grad_(), group)
    shared = collectives.scale_gradient(x.detach().requires_grad_(), 3.0)
    y = torch.zeros(2, requires_grad=True)
    collectives.scale_gradient(y, 3.0).sum().backward()
    with collectives.record() as ledger:
        sent = collectives.broadcast(torch.full((3,), float(rank)), 1, group)
        largest = collectives.largest(float(rank), group, torch.device("cpu"))
        notices = collectives.notices_of_all(bytes([65 + rank]) * (2000 if rank == 2 else 3), group)
        numbers = collectives.integers_of_all([rank, 2**40 + rank], group)
        rows = torch.arange(6.0).view(6, 1) if rank == 1 else torch.zeros(0, 1)
        dealt = collectives.deal(rows, [3, 1, 2], 1, group)
    values = [x.tolist() for x in (everyone, x.grad, total, shared, y.grad, sent, dealt.flatten())]
    return [*values, largest, notices, numbers, ledger.entries, collectives.leaders(group)]


def test_what_each_movement_brings(ranks) -> None:
    for rank, found in enumerate(ranks.run(movements, ranks=3)):
        everyone, grad, total, shared, scaled, sent, dealt, largest, notices, numbers, entries, leaders = found
        assert everyone == [[0, 1], [2, 3], [10, 11], [12, 13], [20, 21], [22, 23]]
        assert grad == [[6.0 * (2 * rank + 1)] * 2, [6.0 * (2 * rank + 2)] * 2]  # 1 + 2 + 3 times the number of the row
        assert total == [[30, 33], [36, 39]] and shared == [[10 * rank, 10 * rank + 1], [10 * rank + 2, 10 * rank + 3]]
        assert scaled == [3.0, 3.0] and sent == [1.0] * 3 and largest == 2.0
        assert notices == [b"AAA", b"BBB", b"C" * 1024] and numbers == [[r, 2**40 + r] for r in range(3)]
        assert dealt == ([0.0, 1.0, 2.0], [3.0], [4.0, 5.0])[rank] and leaders == [0]
        one_sends = [("broadcast", 24), ("deal", 20)] if rank == 1 else [("broadcast", 0), ("deal", 0)]
        assert entries == [one_sends[0], ("agree", 2048), ("agree", 32), one_sends[1]]


@pytest.mark.parametrize("call", [collectives.all_reduce, lambda x, group: collectives.gather(x, [2], group)])
def test_a_rank_alone_sends_nothing(call) -> None:
    x = torch.ones(2, requires_grad=True)
    with collectives.record() as ledger:
        found = call(x, groups.ALONE)
    assert found.tolist() == [1, 1] and ledger.entries == [] and ledger.bytes == 0
