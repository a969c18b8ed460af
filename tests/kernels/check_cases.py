"""The self-check on the kernels themselves, small, in the interpreter; on a GPU as it is. Run as attend_cases.py is."""

import attend_kit
import pytest
import torch

from triton_sp.kernels import attend, attend_backward, check, launch

LENGTHS = (17, 0, 9, 5)
DEVICE = torch.device(attend_kit.DEVICE)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Of the cases one of each layout, with as few heads as it can have."""
    if not attend_kit.ON_GPU:
        shape = {"q": LENGTHS, "k": LENGTHS, "poisoned": 3}
        few = [c._replace(heads=1 + (c.heads > c.k_heads), k_heads=1, **shape) for c in check.cases() if c.dim == 72]
        monkeypatch.setattr(check, "cases", lambda: few)


def test_right_kernels_pass():
    found = check.check(DEVICE, attend.forward, attend_backward.backward, attend_kit.MAIN)
    assert found.passed and found.seconds > 0, found


@pytest.mark.skipif(attend_kit.ON_GPU, reason="it is the interpreter that multiplies the bit patterns of bf16")
def test_a_machine_that_is_wrong_in_bf16_is_found_out(monkeypatch):
    real = launch.find_launch
    monkeypatch.setattr(launch, "find_launch", lambda *call: real(*call[:3], torch.float16, *call[4:]))
    found = check.check(DEVICE, attend.forward, attend_backward.backward)
    assert not found.passed and found.reason.startswith("out is off by up to")
