"""splice: the kernel against its twin. Runs in the interpreter (TRITON_INTERPRET=1) or on a GPU."""

from __future__ import annotations

import pytest
import torch

from triton_sp.ops import dispatch, reference
from triton_sp.ops.splice import splice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_kernels_run() -> None:
    assert dispatch.implementation(DEVICE) != "reference"


def index_of(tokens: int, texts: int, visuals: int, dtype: torch.dtype) -> torch.Tensor:
    """Visual rows at every third token, rows of text and rows of 0 at the others, all in no order."""
    generator = torch.Generator().manual_seed(tokens)
    seen, read = torch.randperm(visuals, generator=generator), torch.randperm(texts, generator=generator)
    index = torch.full((tokens,), -1 - texts)
    for rows, places in ((seen, index[::3]), (-1 - read, index[1::3])):
        count = min(len(rows), len(places))
        places[:count] = rows[:count]
    return index.to(DEVICE, dtype)


# Columns that fill no tile, or more than one; rows that leave a remainder; no visual row, no token.
@pytest.mark.parametrize(
    ("tokens", "texts", "visuals", "columns", "dtype", "index_dtype"),
    [
        (11, 3, 6, 72, torch.float32, torch.int32),
        (9, 20, 2, 1100, torch.bfloat16, torch.int64),
        (7, 7, 0, 16, torch.float16, torch.int64),
        (0, 2, 3, 16, torch.float32, torch.int32),
    ],
)
def test_parity(tokens: int, texts: int, visuals: int, columns: int, dtype, index_dtype) -> None:
    """Copies are bitwise. Rows of the inputs lie apart, one starts at an odd address, the gradient is transposed."""
    torch.manual_seed(0)
    index = index_of(tokens, texts, visuals, index_dtype)
    text = torch.randn(texts, columns + 8, device=DEVICE).to(dtype)[:, :columns].requires_grad_()
    visual = torch.randn(visuals, columns + 3, device=DEVICE).to(dtype)[:, 3:].requires_grad_()
    upstream = torch.randn(columns, tokens, device=DEVICE).to(dtype).t()
    out, twin = splice(text, visual, index), reference.splice(text, visual, index)
    assert torch.equal(out, twin)
    found, expected = (torch.autograd.grad(x, (text, visual), upstream) for x in (out, twin))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)


def test_expanded_gradient() -> None:
    text, visual = torch.ones(3, 16, device=DEVICE).requires_grad_(), torch.ones(2, 16, device=DEVICE).requires_grad_()
    splice(text, visual, torch.tensor([1, -2, -3], device=DEVICE)).sum().backward()
    assert text.grad is not None and text.grad[:, 0].tolist() == [0, 1, 1]
    assert visual.grad is not None and visual.grad[:, 0].tolist() == [0, 1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_more_than_two_to_the_31_elements() -> None:
    columns = 4096
    tokens = 2**31 // columns + 64
    text = torch.zeros(tokens, columns, dtype=torch.bfloat16, device=DEVICE)
    text[-1], visual = 1, torch.full((2, columns), 3, dtype=torch.bfloat16, device=DEVICE)
    index = -1 - torch.arange(tokens, device=DEVICE)
    index[-2] = 1
    out = splice(text, visual, index)
    assert out[[-1, -2, 0], -1].tolist() == [1, 3, 0] and out[[-1, -2, 0], 0].tolist() == [1, 3, 0]
