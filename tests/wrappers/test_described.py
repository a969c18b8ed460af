"""What ranks compare of pixels: sums of the bits of rows, which depend on the values only."""

from __future__ import annotations

import pytest
import torch

from triton_sp.wrappers.inputs.described import _digest

SHAPES = ((), (7,), (8,), (3, 5), (3, 6), (2, 3, 4, 4))
MANY = 1 << 28


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_compared_wherever_they_lie_in_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = _digest(value, MANY)
    longer = torch.cat([torch.zeros(1, dtype=dtype), value.flatten()])
    assert _digest(longer[1:].view(shape), MANY) == found  # begins in the middle of a word
    assert _digest(torch.stack([value, value], -1)[..., 0], MANY) == found  # is not dense
    for place in range(value.numel()):
        other = value.clone()
        other.view(-1)[place] += 0.5
        assert _digest(other, MANY) != found, place


def test_rows_are_told_apart() -> None:
    value = torch.randn(3, 4)
    assert _digest(value[[1, 0, 2]], MANY) != _digest(value, MANY)
