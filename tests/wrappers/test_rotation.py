"""Norms and rotary embeddings of q and k are left to the pack from the second forward on, where a trial has shown that
it does the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kit import tiny, zoo
from kit.parity import (
    CHECKPOINTING,
    TOLERANCE,
    exact_step,
    gradient_error,
    gradients,
    heads,
    in_dtype_of,
    loss_of,
    set_checkpointing,
)
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import triton_sp
from triton_sp.errors import UnsupportedModelError
from triton_sp.ops import reference
from triton_sp.wrappers.layers.norm_trial import HeadNorms
from triton_sp.wrappers.layers.rotation import FOLDED, NORMALISED, Rotator, _current, _Run, rotation_of
from triton_sp.wrappers.layers.rotation_trial import Rotated, try_rotation, version


def turns(model: nn.Module, batch: tiny.Batch, steps: int) -> list[int]:
    """Take steps, the gradients of the last one are kept; how often the reference rotates in each."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        with mock.patch.object(reference, "turn", side_effect=reference.turn) as turn:
            loss_of(model(**batch), None).backward()
        found.append(turn.call_count)
    triton_sp.sync_gradients(model)
    return found


def train(name: str, checkpointing: str, config: triton_sp.SPConfig) -> tuple[list[int], float, str]:
    """Two steps: rotations in each, the error of the second one's gradients, and what is explained."""
    case = zoo.CASES[name]
    with in_dtype_of(case):
        batch = case.batch(next(iter(case.batches)))
        plain, model = case.model(), case.model()
        exact_step(plain, dict(batch))
        set_checkpointing(model, checkpointing)
        triton_sp.wrap(model, config=config)
        found = turns(model, batch, 2)
        return found, gradient_error(gradients(model), gradients(plain))[0], triton_sp.explain(model).rotations


def train_each(name: str, kinds: tuple[str, ...], config: triton_sp.SPConfig) -> list[tuple[list[int], float, str]]:
    return [train(name, checkpointing, config) for checkpointing in kinds]


@pytest.mark.parametrize(
    ("name", "size", "kinds"), [("gpt_neox", 2, tuple(CHECKPOINTING)), ("llama_28_4", 3, ("none",))]
)
def test_second_step(ranks, name: str, size: int, kinds: tuple[str, ...]) -> None:
    """The first forward, and its recomputation, rotate as the model does; then the pack rotates, whole heads and cut
    ones, all of a head's numbers and the first of them. In the trial both q and k are turned once a layer."""
    for found in ranks.run(train_each, name, kinds, heads(size), ranks=size):
        for ((first, second), error, told), kind in zip(found, kinds, strict=True):
            # Of two layers q and k, there and back, and there once more if that is computed again.
            assert (first, second) == (2 * 2, (3 - (kind == "none")) * 2 * 2)
            assert error <= 1e-10
            assert told == f"{FOLDED} in 2 layers"


def test_one_rank(ranks) -> None:
    """Where nothing is exchanged q and k are rotated by themselves; a tower has its tokens first."""
    config = triton_sp.SPConfig(single=True)
    (((first, second), error, told),) = ranks.run(train, "qwen3_vl_moe", "none", config, ranks=1)
    assert (first, second) == (5 * 2, 5 * 4) and error <= TOLERANCE[zoo.CASES["qwen3_vl_moe"].dtype]
    assert told == f"{FOLDED} in 3 layers, {NORMALISED} in 2 layers"


@pytest.mark.parametrize(
    ("size", "kinds", "options"),
    [
        (2, tuple(CHECKPOINTING), {}),
        (2, ("none",), {"chunks": 2}),
        (3, ("none",), {}),
        (2, ("none",), {"plan": "segments"}),
    ],
)
def test_norms(ranks, size: int, kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    """Heads are normalised where they are rotated, and the norms' weights get all of their gradients: of whole heads,
    at once and in parts, of cut ones, and where nothing is exchanged."""
    for found in ranks.run(train_each, "qwen3_vl", kinds, heads(size, **options), ranks=size):
        for _, error, told in found:
            assert error <= 1e-10
            assert told == f"{FOLDED} in 3 layers, {NORMALISED} in 3 layers"


def prepared(how: str) -> tuple[list[int], float]:
    """Two steps of a model whose norms are prepared in some way: how often the reference normalises in each, and the
    error of the second one's gradients."""
    case, found, seen = zoo.CASES["qwen3_vl"], [], []
    with in_dtype_of(case):
        batch, plain, model = case.batch("no_images"), case.model(), case.model()
        for one in (plain, model):
            norms = [module for name, module in one.named_modules() if name.endswith("q_norm")]
            for norm in norms if how == "frozen" else ():
                norm.weight.requires_grad_(False)
        exact_step(plain, dict(batch))
        triton_sp.wrap(model, config=triton_sp.SPConfig(single=True))
        for _ in range(2):
            model.zero_grad()
            with mock.patch.object(reference, "normalise", side_effect=reference.normalise) as normalise:
                loss_of(model(**batch), None).backward()
            found.append(normalise.call_count)
            for norm in norms if how == "hooks" else ():
                norm.register_forward_hook(lambda module, given, made: seen.append(torch.equal(given[0], made)))
        assert not any(seen) and bool(seen) == (how == "hooks")
        return found, gradient_error(gradients(model), gradients(plain))[0]


@pytest.mark.parametrize(("how", "expected"), [("frozen", 2), ("hooks", 0)])
def test_prepared_norms(ranks, how: str, expected: int) -> None:
    """Without a gradient for the weights of q's, and with hooks that see what q's have made. In the trial the model's
    own code normalises; then the pack does, of each of 3 layers q and k, and in the backward not by this function."""
    (((first, second), error),) = ranks.run(prepared, how, ranks=1)
    assert (first, second) == (0, 3 * expected) and error <= 1e-10


def step(options: dict[str, Any]) -> tuple[list[int], str]:
    """Two steps of a Llama of two layers on packed tokens."""
    case = zoo.CASES["llama"]
    model = triton_sp.wrap(case.model(), config=triton_sp.SPConfig(single=True, **options))
    return turns(model, case.batch("plain"), 2), triton_sp.explain(model).rotations


@pytest.mark.parametrize(
    ("options", "found", "told"),
    [
        ({"trial": "off"}, [0, 0], 'the model\'s own code (SPConfig(trial="off")) in 2 layers'),
        # The first forward verifies the first layer, which is tried in the second one, as that verifies the second.
        ({"verify": 1}, [2, 2], f"{FOLDED} in 2 layers"),
    ],
)
def test_own_code(ranks, options: dict[str, Any], found: list[int], told: str) -> None:
    """Without a trial nothing is left to the pack, nor in a layer that is computed once more by the textbook."""
    assert ranks.run(step, options, ranks=1) == [(found, told)]


def replace_forward() -> list[list[int]]:
    """A step after a trial, and one after something else has replaced the forward of the class."""
    case = zoo.CASES["llama"]
    model, batch = triton_sp.wrap(case.model(), config=triton_sp.SPConfig(single=True)), case.batch("plain")
    model(**batch)
    found = [turns(model, batch, 1)]
    own = modeling_llama.LlamaAttention.forward
    with mock.patch.object(modeling_llama.LlamaAttention, "forward", lambda *args, **kwargs: own(*args, **kwargs)):
        return [*found, turns(model, batch, 1)]


def test_another_forward_runs_as_it_is(ranks) -> None:
    assert ranks.run(replace_forward, ranks=1) == [[[2 * 4], [0]]]


def autocast(name: str, batch_name: str) -> tuple[list[float], str]:
    """How far the gradients of the first step in bf16, by the model's own code, and of the second one are from those in
    float32; what is explained."""
    plain, model = (zoo.CASES[name].model().float() for _ in range(2))
    batch, found = zoo.CASES[name].batch(batch_name), []
    loss_of(plain(**batch), None).backward()
    triton_sp.wrap(model, config=triton_sp.SPConfig(single=True))
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model(**batch), None).backward()
        found.append(gradient_error(gradients(model), gradients(plain))[0])
    return found, triton_sp.explain(model).rotations


@pytest.mark.parametrize(
    ("name", "batch", "told"), [("llama", "plain", f"{FOLDED} in 2"), ("qwen3_vl", "no_images", f"{NORMALISED} in 3")]
)
def test_autocast(ranks, name: str, batch: str, told: str) -> None:
    """What is rounded once instead of several times is about as exact, or more so."""
    (((own, packed), explained),) = ranks.run(autocast, name, batch, ranks=1)
    assert packed != own and packed < min(1.2 * own, 0.1)
    assert explained.endswith(f"{told} layers")


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """As Llama's."""
    cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
    q, k = (x * cos + modeling_llama.rotate_half(x) * sin for x in (q, k))
    return q, k


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Neighbouring numbers are turned with one another."""
    q, k = (
        x * cos.unsqueeze(axis) + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin.unsqueeze(axis)
        for x in (q, k)
    )
    return q, k


def rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """In float32, whatever it is given."""
    q, k = (x.double() for x in rotate(q.float(), k.float(), cos.float(), sin.float(), axis))
    return q, k


LAY = (lambda x: x, lambda x: x.transpose(0, 1)[None], lambda x: x.transpose(1, 2))
SHAPES = (((1, 4, 7, 8), (1, 2, 7, 8), (1, 7, 8), 1), ((7, 4, 8), (7, 2, 8), (7, 8), -2),
          ((1, 7, 4, 8), (1, 7, 2, 8), (1, 7, 8), 2))  # fmt: skip


def tried(function: Any, layout: int = 0, after: Any = None, trained: bool = False) -> tuple[int, str]:
    """The result of a trial of a function, on q and k in a layout; `after` it something is done to q."""
    q_shape, k_shape, shape, axis = SHAPES[layout]
    q, k = (torch.randn(x, dtype=torch.double) for x in (q_shape, k_shape))
    tables = [torch.randn(shape, dtype=torch.double, requires_grad=trained) for _ in range(2)]
    made = function(q, k, *tables, axis)
    call = Rotated(function, (q, k, *tables, axis), {}, made, [version(x) for x in made])
    query = LAY[layout](made[0])
    return try_rotation([call], query if after is None else after(query), LAY[layout](made[1]))


def test_trial() -> None:
    """Each layout is found, and what differs in any way is left to the model's own code."""
    assert [tried(rotate, layout) for layout in range(3)] == [(0, ""), (1, ""), (2, "")]
    assert "another way" in tried(interleaved)[1] and "precision" in tried(rounded)[1]
    assert "something else" in tried(rotate, after=lambda q: q * 1.0)[1]
    assert "something else" in tried(rotate, after=lambda q: q.transpose(2, 3))[1]
    assert "after it has rotated" in tried(rotate, after=lambda q: q.mul_(2.0))[1]
    assert "trained" in tried(rotate, trained=True)[1]


def test_what_was_left_must_arrive() -> None:
    """A module that hands on other queries in a later call is refused: they are not rotated, or not normalised."""
    module, norms = nn.Identity(), (nn.RMSNorm(8), nn.RMSNorm(8))
    q, k, cos, sin = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    rotator = Rotator(0, "", 0, HeadNorms(("q_norm", "k_norm"), (nn.RMSNorm, None), 1e-5, 1.0))

    def arrived(query: Tensor, key: Tensor, *rows: Any, **options: Any) -> Any:
        run = _Run(module, rotator, True, 1, **{"left": (q, k, cos, sin)} | options, rows=list(rows))
        token = _current.set(run)
        try:
            assert rotation_of(nn.Identity(), query, key, k) is None
            return rotation_of(module, query, key, k)
        finally:
            _current.reset(token)

    found = arrived(q, k)
    assert torch.equal(found.cos, cos[0]) and torch.equal(found.sin, sin[0]) and found.norm is None
    given = [(norms[0], q.transpose(1, 2)), (norms[1], k.transpose(1, 2))]
    assert arrived(q, k, *given, norms=norms).norm == ((norms[0].weight, norms[1].weight), 1e-5, 1.0, ())
    swapped = [(norms[1], q), (norms[0], k)]
    for others, options in (
        ((q, k.clone()), {}),
        ((q, k, *given), {"left": None, "norms": norms}),
        ((q, k, *given[:1]), {"norms": norms}),
        ((q, k, given[0], (norms[1], k.clone())), {"norms": norms}),
        ((q, k, *swapped), {"norms": norms}),
        ((q, k, *given, given[0]), {"norms": norms}),
    ):
        with pytest.raises(UnsupportedModelError, match="its rotation have returned"):
            arrived(*others, **options)
