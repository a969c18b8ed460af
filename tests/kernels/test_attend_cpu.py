"""attend on the CPU: its own backward against autograd of the textbook, in fp64."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from triton_sp.errors import InputError
from triton_sp.kernels.mask import Mask
from triton_sp.ops import attend_cpu
from triton_sp.ops.varlen import varlen_attention

ROWS, KEYS = torch.tensor([0, 9, 9, 30]), torch.tensor([0, 12, 15, 36])
RANGES = torch.stack([torch.arange(33) // 2, torch.arange(33) + 5])
MASKS = {
    "whole": Mask(ROWS),
    "causal": Mask(ROWS, causal=True),
    "window": Mask(ROWS, causal=True, window=4),
    "window both ways": Mask(ROWS, window=3),
    "more keys than rows": Mask(ROWS, KEYS, causal=True),
    "keys left out": Mask(ROWS, KEYS, seqused_k=torch.tensor([0, 3, 19]), causal=True),
    "ranges": Mask(ROWS, key_ranges=RANGES),
    "no segment": Mask(torch.tensor([0])),
}


@pytest.mark.parametrize(
    ("softcap", "v_dim", "sunk"), [(0.0, 5, False), (1.5, 5, True), (0.0, 3, True), (0.0, 8, False), (1.5, 1, False)]
)
@pytest.mark.parametrize("name", MASKS)
def test_backward_is_that_of_the_textbook(name: str, softcap: float, v_dim: int, sunk: bool) -> None:
    sinks = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64).requires_grad_() if sunk else None
    mask, factors = MASKS[name], {"softmax_scale": 0.4, "softcap": softcap, "sinks": sinks}
    keys = 30 if mask.cu_seqlens_k is None else 40
    torch.manual_seed(0)
    shapes = [(33, 4, 5), (keys + 3, 2, 5), (keys + 3, 2, v_dim)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    expected, lse_HT = attend_cpu.attend_exactly(q, k, v, mask, **factors)
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    of_scores = factors | {"softcap": softcap or None}
    out, lse_TH = varlen_attention(q, k, v, mask, return_lse=True, **of_scores)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse_TH.T, lse_HT, rtol=1e-12, atol=1e-12)
    dout, weight = torch.randn_like(out), torch.randn_like(lse_HT)
    for with_lse in (False, True):
        wanted, found = ((x * dout).sum() for x in (expected, out))
        wanted = wanted + 0 * sum(x.sum() for x in leaves)  # without a segment the textbook has no gradient
        if with_lse:
            seen = torch.isfinite(lse_HT)
            wanted = wanted + (lse_HT.where(seen, 0.0) * weight).sum()
            found = found + (lse_TH.T.where(seen, 0.0) * weight).sum()
        grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (wanted, found)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


def test_a_second_derivative_raises() -> None:
    q = torch.randn(5, 1, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(varlen_attention(q, q, q, Mask(torch.tensor([0, 5]))).sum(), q, create_graph=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sunk", [False, True])
def test_short_segments_of_one_length_are_one_call(causal: bool, sunk: bool) -> None:
    """And each comes out, with its gradients, as by itself: neighbours or not, and with key heads that are shared."""
    torch.manual_seed(0)
    lengths = [4, 4, 7, 4, 300, 7, 0, 4]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, dout = torch.randn(2, sum(lengths) + 3, 4, 8)
    k, v = torch.randn(2, sum(lengths) + 3, 2, 8)
    sinks, scale = torch.randn(4) if sunk else None, {"softmax_scale": 0.3}

    def run(rows: slice, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
        mask, own = Mask(cu_seqlens, causal=causal), (q[rows], k[rows], v[rows])
        out, lse = attend_cpu.attend(*own, mask, **scale, sinks=sinks)
        grads = attend_cpu.attend_backward(dout[rows], None, (*own, out, lse), mask, **scale, sinks=sinks)
        return [out, lse.T, *grads[:3]]

    calls = mock.Mock(side_effect=attend_cpu._FLASH)
    with mock.patch.object(attend_cpu, "_FLASH", calls):
        together = run(slice(None), bounds)
    assert calls.call_count == 3  # of 4, 7 and 300 rows
    for start, stop in pairwise(bounds.tolist()):
        for found, expected in zip(together, run(slice(start, stop), torch.tensor([0, stop - start])), strict=True):
            if sunk:  # vector and scalar exponentials differ in the last bit
                torch.testing.assert_close(found[start:stop], expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[start:stop], expected)
    assert bool((together[1][sum(lengths) :] == -torch.inf).all()) and not together[0][sum(lengths) :].any()
