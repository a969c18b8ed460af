"""The loss by Liger-Kernel's fused linear cross entropy, in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from triton_sp import loss
from triton_sp.loss import LogitTransform
from triton_sp.testing import relative_error

CPU, PLAIN = torch.device("cpu"), LogitTransform()


@pytest.mark.parametrize(("bias", "smoothing"), [(False, 0.1), (True, 0.0)])
def test_parity(bias: bool, smoothing: float, monkeypatch) -> None:
    """The same loss and gradients as the head in chunks, which is what computes elsewhere than on a GPU."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 37, bias), torch.randn(11, 16)
    targets = torch.arange(11).masked_fill(torch.arange(11) % 4 == 0, -100)
    runs = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(loss, "LIGER_DEVICES", devices)
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        with mock.patch.object(loss, "_by_liger", wraps=loss._by_liger) as liger:
            total = loss.head_cross_entropy(head, states, targets, label_smoothing=smoothing)
        assert liger.call_count == len(devices)
        (total / 3).backward()
        runs.append([total.detach(), states.grad, *(p.grad.clone() for p in head.parameters())])
    for expected, found in zip(*runs, strict=True):
        assert relative_error(found, expected) < 1e-6


def test_what_it_cannot_stand_for(monkeypatch) -> None:
    linear = nn.Linear(2, 2)
    assert not loss.liger_fits(linear, CPU, torch.float32, PLAIN)
    monkeypatch.setattr(loss, "LIGER_DEVICES", ("cpu",))
    assert loss.liger_fits(linear, CPU, torch.float32, PLAIN)
    assert not loss.liger_fits(linear, CPU, torch.float64, PLAIN)
    assert not loss.liger_fits(linear, CPU, torch.float32, LogitTransform(softcap=3.0))
    assert not loss.liger_fits(nn.Sequential(linear), CPU, torch.float32, PLAIN)

    # It would leave the head without a gradient where hidden states need none, and divide by no tokens.
    for hidden in (torch.randn(3, 2), torch.randn(0, 2, requires_grad=True)):
        linear.zero_grad()
        loss.head_cross_entropy(linear, hidden, torch.ones(len(hidden), dtype=torch.long)).backward()
        assert linear.weight.grad is not None and bool(linear.weight.grad.any()) == bool(len(hidden))
