"""varlen_attention: the kernels in Triton's interpreter, and the choice between them and the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sp.errors import InputError
from triton_sp.kernels.mask import Mask
from triton_sp.ops import dispatch, varlen


def test_cpu_runs_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.implementation("cpu") == "reference"
    assert dispatch.implementation(torch.device("cuda", 1)) == ("triton" if dispatch.HAS_TRITON else "reference")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.implementation("cuda") == "reference"


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"softcap": -1.0},
        {"softmax_scale": 0.0},
        {"sinks": torch.zeros(3)},
        {"cu_seqlens_k": torch.zeros(3).int()},
        {"key_ranges": torch.zeros(2, 3).int()},
        {"key_ranges": torch.zeros(2, 4).int(), "causal": True},
        {"key_ranges": torch.tensor([[0, 0, 1, 0], [4, 4, 4, 4]])},
    ],
)
def test_wrong_settings_raise(wrong):
    x = torch.zeros(4, 2, 8)
    with pytest.raises(InputError):
        of_mask = {name: value for name, value in wrong.items() if name in Mask._fields}
        others = {name: value for name, value in wrong.items() if name not in Mask._fields}
        varlen.varlen_attention(x, x, x, Mask(torch.tensor([0, 4]), **of_mask), **others)


def test_reference_has_gradients_of_both_results():
    q, k, v = (torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def both(q, k, v):
        return varlen.varlen_attention(q, k, v, Mask(torch.tensor([0, 3, 7]), causal=True, window=2), return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_key_ranges_of_the_reference(lengths, generator, exact) -> None:
    """Any ranges that never decrease, in fp64, against a dense softmax with the mask written out."""
    total = sum(lengths)
    table = torch.tensor([0, *lengths]).cumsum(0)
    bounds = torch.tensor([sorted(generator.randint(0, total) for _ in range(total)) for _ in range(2)])
    bounds[1] = bounds.amax(0)
    q, k, v = torch.randn(3, total, 2, 4, dtype=torch.float64).requires_grad_()
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    key = torch.arange(total)
    seen = (segment[:, None] == segment) & (key >= bounds[0][:, None]) & (key < bounds[1][:, None])
    scores = (torch.einsum("qhd,khd->hqk", q, k) / 2).masked_fill(~seen, -1e300)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1).masked_fill(~seen, 0.0), v)
    found = varlen.varlen_attention(q, k, v, Mask(table, key_ranges=bounds), return_lse=exact)
    torch.testing.assert_close(found[0] if exact else found, expected, rtol=1e-12, atol=1e-12)
