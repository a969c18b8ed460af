"""Plain modules: whatever way they attend, they compute what they compute on one process, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kit import plain_vits
from kit.parity import gradient_error, gradients
from torch.utils.checkpoint import checkpoint

import triton_sp
from triton_sp import errors
from triton_sp.ranks import collectives
from triton_sp.testing import RankError, relative_error
from triton_sp.wrappers.plain.trial import GATHERED, HEADS

HEADS_PLAN = triton_sp.SPConfig(plan="heads")  # whatever the cost model thinks of models this small
METHODS = dict.fromkeys(plain_vits.MODELS, HEADS) | {"matmul": GATHERED, "mixing": GATHERED, "scaled": GATHERED}
METHODS.pop("conv")


def run(name: str, images: int) -> tuple[float, float, str, dict[str, int]]:
    """Output error, gradient error, explain's account and the collectives of a second forward."""
    model, pixels = plain_vits.build(name), plain_vits.pixels(images)
    reference = copy.deepcopy(model)
    triton_sp.wrap(model, config=HEADS_PLAN)
    expected = reference(pixels)
    model(pixels)
    with collectives.record() as ledger:
        out = model(pixels)
    forward = {kind: ledger.count(kind) for kind in ("exchange", "gather")}
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weights).mean().backward()
    (out * weights).mean().backward()
    triton_sp.sync_gradients(model)
    error, _ = gradient_error(gradients(model), gradients(reference))
    return relative_error(out, expected), error, str(triton_sp.explain(model)), forward


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_parity(ranks, name: str, size: int) -> None:
    for output, gradient, told, forward in ranks.run(run, name, 3, ranks=size):
        assert output < 1e-10, (name, output)
        assert gradient < 1e-10, (name, gradient)
        assert METHODS[name] in told, told
        blocks = 2
        if METHODS[name] == HEADS:
            assert forward == {"exchange": 2 * blocks, "gather": 1}
        else:
            assert forward == {"exchange": 0, "gather": blocks + 1}


def run_segments(name: str) -> tuple[float, dict[str, int]]:
    """Shards that are whole images need no exchange, whatever way a block attends."""
    model, pixels = plain_vits.build(name), plain_vits.pixels(4)
    expected = model(pixels)
    triton_sp.wrap(model, config=triton_sp.SPConfig(plan="segments"))
    model(pixels)
    with collectives.record() as ledger:
        out = model(pixels)
    return relative_error(out, expected), {kind: ledger.count(kind) for kind in ("exchange", "gather")}


@pytest.mark.parametrize("name", ["sdpa", "matmul", "mixing"])
def test_whole_images(ranks, name: str) -> None:
    for error, sent in ranks.run(run_segments, name, ranks=2):
        assert error < 1e-10
        assert sent["exchange"] == 0


def run_inference(name: str) -> float:
    """eval and no_grad: torch's own layers take another way then."""
    model, pixels = plain_vits.build(name).eval(), plain_vits.pixels(2)
    with torch.no_grad():
        expected = model(pixels)
        return relative_error(triton_sp.wrap(model, config=HEADS_PLAN)(pixels), expected)


@pytest.mark.parametrize("name", ["torch_layers", "torch_encoder", "tokens_first", "multihead"])
def test_inference(ranks, name: str) -> None:
    assert max(ranks.run(run_inference, name, ranks=2)) < 1e-10


def run_refused(name: str) -> None:
    model = triton_sp.wrap(plain_vits.build(name))
    model(plain_vits.pixels(2))


def test_tokens_that_meet_outside_of_attention_are_refused(ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(run_refused, "conv", ranks=2)
    for error in caught.value.errors.values():
        assert isinstance(error, errors.UnsupportedModelError) and error.field == "ConvBlock"


def run_one_image_a_rank(name: str) -> str:
    """Shards that are whole images: nothing in this batch tells a block that mixes the tokens of an image."""
    model = triton_sp.wrap(plain_vits.build(name))
    model(plain_vits.pixels(2).zero_())
    return str(triton_sp.explain(model))


def test_trial_does_not_depend_on_the_batch(ranks) -> None:
    for told in ranks.run(run_one_image_a_rank, "mixing", ranks=2):
        assert GATHERED in told


def run_unwrap(name: str) -> None:
    model, pixels = plain_vits.build(name), plain_vits.pixels(2)
    expected = model(pixels)
    attributes = [set(vars(module)) for module in model.modules()]
    triton_sp.wrap(model, config=HEADS_PLAN)
    twin = copy.deepcopy(model)
    for wrapped in (model, twin, copy.deepcopy(model)):  # a copy of one that was called, and of one that was not
        assert relative_error(wrapped(pixels), expected) < 1e-10
    triton_sp.unwrap(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(pixels), expected)


@pytest.mark.parametrize("name", ["sdpa", "multihead", "matmul"])
def test_unwrap_and_copies(ranks, name: str) -> None:
    ranks.run(run_unwrap, name, ranks=2)


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(plain_vits.Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def run_checkpointed() -> None:
    model = triton_sp.wrap(Checkpointed(), config=HEADS_PLAN)
    model(torch.ones(2, 5, plain_vits.WIDTH, requires_grad=True)).sum().backward()


def run_dropout() -> None:
    layer = torch.nn.TransformerEncoderLayer(plain_vits.WIDTH, plain_vits.HEADS, 32, dropout=0.1, batch_first=True)
    model = triton_sp.wrap(torch.nn.TransformerEncoder(layer, 2), config=HEADS_PLAN)
    model(torch.ones(2, 5, plain_vits.WIDTH))


@pytest.mark.parametrize(
    ("job", "found"), [(run_checkpointed, "a checkpoint around it"), (run_dropout, "dropout_p=0.1")]
)
def test_refused_when_they_happen(ranks, job: Callable[[], None], found: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(job, ranks=2, timeout=60)
    for rank in range(2):
        error = caught.value.errors[rank]
        assert isinstance(error, errors.UnsupportedModelError) and found in error.found


def run_padding_mask() -> float:
    """A mask that differs between images, in inference, where torch would go on with nested tensors."""
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(plain_vits.torch_layer(True), 2).double().eval()
    x = torch.randn(2, 5, plain_vits.WIDTH, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        out = triton_sp.wrap(model, config=HEADS_PLAN)(x, src_key_padding_mask=mask)
    return relative_error(out[~mask], expected[~mask])


def test_padding_mask(ranks) -> None:
    assert max(ranks.run(run_padding_mask, ranks=2)) < 1e-10
