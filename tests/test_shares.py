"""The shares of a loss: what each rank adds, and what becomes of its gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from triton_sp import loss
from triton_sp.loss import LogitTransform
from triton_sp.ranks import groups


def shares(count: float | torch.Tensor, gradient: str) -> tuple[float, float, str]:
    share = torch.tensor(1.5 + dist.get_rank(), dtype=torch.float64, requires_grad=True)
    found = loss.mean_of_shares(share * 2, count, groups.resolve_group(), gradient)
    found.backward()
    return float(found.detach()), float(share.grad), str(found.dtype)


def test_shares_are_summed_and_divided(ranks) -> None:
    """(3 + 5 + 7) / count on every rank. A mean over 3 ranks of its gradient is 2 / count, or a sum of them is."""
    for count, divisor in ((6, 6), (torch.tensor(2.5), 2.5), (0, 1), (0.0, 1)):
        for gradient, factor in (("mean", 3), ("sum", 1)):
            found = ranks.run(shares, count, gradient, ranks=3)
            assert found == [(15 / divisor, pytest.approx(2 * factor / divisor), "torch.float64")] * 3


def test_a_rank_alone_has_it_all() -> None:
    share = torch.tensor(8.0, requires_grad=True)
    found = loss.mean_of_shares(share, 4, groups.ALONE, "mean")
    found.backward()
    assert (float(found.detach()), float(share.grad)) == (2.0, 0.25)


def test_targets_are_the_labels_that_follow() -> None:
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert loss.shift(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]


def test_what_models_do_to_logits() -> None:
    x = torch.tensor([-50.0, 0.5, 50.0])
    assert LogitTransform()(x) is x
    assert LogitTransform(0.5)(x).tolist() == [-25.0, 0.25, 25.0]
    torch.testing.assert_close(LogitTransform(2.0, 10.0)(x), 10 * torch.tanh(2 * x / 10))
    torch.testing.assert_close(LogitTransform(softcap=3.0)(x), 3 * torch.tanh(x / 3))


def test_a_chunk_of_logits_is_256_mib() -> None:
    assert loss.chunk_rows(152_064) * 152_064 * 4 <= 256 << 20 < (loss.chunk_rows(152_064) + 1) * 152_064 * 4
    assert loss.chunk_rows(1 << 40) == 1 and loss.chunk_rows(0) == loss.chunk_rows(1) == 1 << 26


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"device": "xpu"}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float64}, False),
        ({"transform": LogitTransform(scale=2.0)}, False),
        ({"transform": LogitTransform(softcap=2.0)}, False),
        ({"head": nn.Sequential(nn.Linear(2, 3))}, False),
        ({"head": type("Other", (nn.Linear,), {})(2, 3)}, False),
        ({"installed": False}, False),
    ],
)
def test_which_heads_liger_can_replace(change: dict, fits: bool) -> None:
    chosen = {"head": nn.Linear(2, 3), "device": "cuda", "dtype": torch.float32, "transform": LogitTransform()} | change
    with mock.patch.object(loss, "liger_installed", lambda: chosen.pop("installed", True)):
        device = torch.device(chosen["device"])
        assert loss.liger_fits(chosen["head"], device, chosen["dtype"], chosen["transform"]) == fits


def test_a_quantised_head_is_not_replaced() -> None:
    head = nn.Linear(2, 3)
    del head.weight
    head.weight = type("Quantised", (torch.Tensor,), {})(3, 2)
    with mock.patch.object(loss, "liger_installed", lambda: True):
        assert not loss.liger_fits(head, torch.device("cuda"), torch.float32, LogitTransform())


def test_a_head_runs_on_tokens_with_a_target_only() -> None:
    """And once on none, to learn how many words there are; a rank without targets calls it too."""
    calls: list[int] = []
    head = nn.Linear(2, 5)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return head(hidden)

    targets = torch.tensor([1, -100, 2, 4])
    with mock.patch.object(loss, "CHUNK_ELEMENTS", 10):
        total = loss.head_cross_entropy(head, torch.randn(4, 2), targets, forward=forward)
    assert calls == [0, 2, 1] and total > 0
    calls.clear()
    nothing = loss.head_cross_entropy(
        head, torch.randn(4, 2, requires_grad=True), torch.full((4,), -100), forward=forward
    )
    nothing.backward()
    assert calls == [0, 0, 0] and nothing == 0 and head.weight.grad is not None and not head.weight.grad.any()
