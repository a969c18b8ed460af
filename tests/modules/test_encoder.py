"""ShardedEncoder and ShardedAttention, for people with their own model script, against the same modules unsharded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from kit import plain_vits
from kit.parity import gradient_error, gradients
from torch import Tensor, nn

import triton_sp
from triton_sp import errors
from triton_sp.modules.encoder import ShardedAttention, ShardedEncoder
from triton_sp.testing import RankError, relative_error
from triton_sp.wrappers.plain.trial import GATHERED, HEADS

WIDTH = plain_vits.WIDTH


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_encoder(gradient: str) -> tuple[float, float, float, str]:
    """Blocks with a positional argument beside the hidden states; the loss is formed of the whole result."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(plain_vits.RotaryBlock() for _ in range(2)).double()
    reference = copy.deepcopy(blocks)
    encoder = ShardedEncoder(blocks, None, triton_sp.SPConfig(gradient=gradient, plan="heads"))
    angles = random(7, WIDTH // plain_vits.HEADS)
    x, y = random(3, 7, WIDTH).requires_grad_(), random(3, 7, WIDTH).requires_grad_()
    expected, out = x, encoder(y, angles)
    for block in reference:
        expected = block(expected, angles)
    expected.square().sum().backward()
    out.square().sum().backward()
    triton_sp.sync_gradients(encoder)
    dist.all_reduce(y.grad)
    if gradient == "mean":
        y.grad /= dist.get_world_size()
    error, _ = gradient_error(gradients(encoder.blocks), gradients(reference))
    return relative_error(out, expected), error, relative_error(y.grad, x.grad), str(triton_sp.explain(encoder))


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_encoder(ranks, gradient: str) -> None:
    for output, parameters, hidden, told in ranks.run(run_encoder, gradient, ranks=3):
        assert max(output, parameters, hidden) < 1e-10
        assert HEADS in told


ATTENTION = {
    "sdpa": (plain_vits.SDPAAttention, HEADS),
    "causal": (plain_vits.CausalAttention, HEADS),
    "matmul": (plain_vits.MatmulAttention, GATHERED),
    "mixing": (plain_vits.MixingAttention, GATHERED),
    "multihead": (lambda: nn.MultiheadAttention(WIDTH, plain_vits.HEADS, batch_first=True), HEADS),
}


def run_attention(name: str) -> tuple[float, float, float, str]:
    """Parts of uneven size, one of them empty where there are three ranks; two sequences."""
    torch.manual_seed(0)
    attention = ATTENTION[name][0]().double()
    reference = copy.deepcopy(attention)
    sizes = {2: (3, 8), 3: (4, 0, 7)}[dist.get_world_size()]
    start = sum(sizes[: dist.get_rank()])
    own = slice(start, start + sizes[dist.get_rank()])
    whole, weights = random(2, 11, WIDTH).requires_grad_(), random(2, 11, WIDTH, seed=1)
    local = whole.detach()[:, own].clone().requires_grad_()

    sharded = ShardedAttention(attention)
    out = sharded(local)
    if isinstance(attention, nn.MultiheadAttention):
        out, expected = out[0], reference(whole, whole, whole)[0]
    else:
        expected = reference(whole)
    (expected * weights).sum().backward()
    (out * weights[:, own]).sum().backward()
    for parameter in attention.parameters():
        dist.all_reduce(parameter.grad)
    error, _ = gradient_error(gradients(attention), gradients(reference))
    return relative_error(out, expected[:, own]), error, relative_error(local.grad, whole.grad[:, own]), sharded.method


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(ranks, name: str, size: int) -> None:
    for output, parameters, hidden, method in ranks.run(run_attention, name, ranks=size):
        assert max(output, parameters, hidden) < 1e-10
        assert method == ATTENTION[name][1]


def run_disagreeing() -> None:
    ShardedAttention(plain_vits.SDPAAttention())(torch.zeros(1 + dist.get_rank(), 4, WIDTH))


def test_ranks_with_other_sequences_are_told(ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(run_disagreeing, ranks=2)
    assert [type(caught.value.errors[rank]) for rank in range(2)] == [errors.DisagreementError] * 2
    assert "rank 0" in str(caught.value.errors[1]) and "rank 1" in str(caught.value.errors[0])
