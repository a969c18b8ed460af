"""The operators that move rows, on the CPU, held to loops over single vectors."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_sp.errors import InputError
from triton_sp.kernels.mask import Norm, Rotation
from triton_sp.ops import pack, splice


def heads_of(rank: int, heads: int, ranks: int) -> list[int]:
    """The heads that a rank attends with; where there are fewer heads than ranks, neighbouring ranks have the same."""
    return [rank * heads // ranks] if heads < ranks else list(range(rank * heads // ranks, (rank + 1) * heads // ranks))


COUNTS = st.sampled_from([(1, [4, 2]), (2, [4, 2, 2]), (4, [4, 2, 1]), (4, [8, 1, 1]), (3, [3]), (6, [12, 3, 2])])


@settings(deadline=None)
@given(COUNTS, st.integers(0, 4), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_heads_go_to_the_ranks_that_attend_with_them(counts: tuple[int, list[int]], rows: int, dtype) -> None:
    ranks, heads = counts
    xs = [torch.randn(rows, count, 3).to(dtype) for count in heads]
    wanted = [
        x[row, head]
        for rank in range(ranks)
        for row in range(rows)
        for x in xs
        for head in heads_of(rank, x.shape[1], ranks)
    ]
    packed = pack.pack_heads(xs, ranks)
    assert packed.dtype == dtype and packed.shape == (len(wanted), 3)
    assert torch.equal(packed, torch.stack(wanted) if wanted else packed)
    wide = torch.promote_types(dtype, torch.float32)
    sums = [torch.zeros(x.shape, dtype=wide) for x in xs]
    vectors = iter(packed)
    for rank in range(ranks):
        for row in range(rows):
            for x, total in zip(xs, sums, strict=True):
                for head in heads_of(rank, x.shape[1], ranks):
                    total[row, head] += next(vectors).to(wide)
    back = [torch.full_like(x, torch.nan).transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
    pack.unpack_heads(packed, back, ranks)
    for found, total in zip(back, sums, strict=True):
        torch.testing.assert_close(found, total.to(dtype))


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """(T, heads, D) with each vector turned by the numbers of its row, pair by pair."""
    out, half = x.clone(), rotation.cos.shape[1] // 2
    for row, (cos, sin) in enumerate(zip(rotation.cos, rotation.sin, strict=True)):
        for i in range(half):
            first, second = x[row, :, i], x[row, :, i + half]
            out[row, :, i] = first * cos[i] - second * sin[i]
            out[row, :, i + half] = second * cos[i + half] + first * sin[i + half]
    return out


def rotation_of(rows: int, turns: int) -> Rotation:
    return Rotation(*(torch.randn(rows, turns, dtype=torch.float64) for _ in range(2)))


@settings(deadline=None)
@given(COUNTS, st.integers(1, 4), st.sampled_from([2, 4, 6]))
def test_queries_and_keys_are_turned_on_their_way(counts: tuple[int, list[int]], rows: int, turns: int) -> None:
    """Values are not. The way back is the adjoint: <pack(x), y> is <x, unpack(y)> for any y."""
    ranks, heads = counts
    xs, rotation = [torch.randn(rows, count, 6, dtype=torch.float64) for count in heads], rotation_of(rows, turns)
    found = pack.pack_heads(xs, ranks, rotation)
    expected = pack.pack_heads([turned(x, rotation) for x in xs[:2]] + xs[2:], ranks)
    torch.testing.assert_close(found, expected)
    there, back = torch.randn_like(found), [torch.empty_like(x) for x in xs]
    pack.unpack_heads(there, back, ranks, rotation.adjoint)
    torch.testing.assert_close(
        (found * there).sum(), sum((x * y).sum() for x, y in zip(xs, back, strict=True)), rtol=1e-10, atol=1e-10
    )


def test_where_nothing_is_sent_queries_and_keys_are_turned_in_place_of_packing() -> None:
    q, k, v = (torch.randn(5, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    rotation = rotation_of(5, 4)
    expected = [turned(q, rotation), turned(k, rotation)]
    found = pack.rotated((q, k, v), rotation)
    torch.testing.assert_close(found, (*expected, v))
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: pack.Rotate.apply(q, k, rotation), (q, k))
    torch.testing.assert_close(pack.Rotate.apply(q, k, rotation), tuple(expected))
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(pack.Rotate.apply(q, k, rotation)[0].sum(), q, create_graph=True)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * (1 + weight)


def test_norms_of_queries_and_keys_and_their_adjoint() -> None:
    """What is packed and what comes back, of several ranks and of none, beside autograd of the formula."""
    q, k, v = (torch.randn(5, heads, 6, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    weights = tuple(torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2))
    rotation = rotation_of(5, 4)
    turns = [turned(normalised(x, weight), rotation) for x, weight in zip((q, k), weights, strict=True)]
    way = rotation._replace(norm=Norm(weights, eps=0.1, offset=1.0))
    for ranks in (1, 2, 4):
        with torch.no_grad():
            found = pack.pack_heads([q, k, v], ranks, way)
            torch.testing.assert_close(found, pack.pack_heads([*turns, v], ranks))
            dy, grads, plain = torch.randn_like(found), *([torch.empty_like(x) for x in (q, k, v)] for _ in range(2))
            pack.unpack_heads(dy, plain, ranks)
            dweights = pack.unpack_heads(dy, grads, ranks, way.of(q, k, *weights).adjoint)
        dq, dk, *expected = torch.autograd.grad(turns, (q, k, *weights), plain[:2], retain_graph=True)
        assert dweights is not None
        torch.testing.assert_close((*grads, *dweights), (dq, dk, plain[2], *expected))
    found = pack.Rotate.apply(q, k, way, *weights)
    torch.testing.assert_close(found, tuple(turns))
    dys = [torch.randn_like(x) for x in turns]
    inputs = (q, k, *weights)
    expected = torch.autograd.grad(turns, inputs, dys)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, dys), expected)
    frozen = [weight.detach() for weight in weights]
    found = pack.Rotate.apply(q, k, way._replace(norm=Norm((frozen[0], frozen[1]), eps=0.1, offset=1.0)), *frozen)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k), dys), expected[:2])


def test_boxes_may_be_of_a_part_of_a_buffer() -> None:
    boxes = [(0, 0, 2, 1, 1, 1, 2), (0, 1, 1, 0, 1, 0, 1), (0, 0, 1, 0, 1, 2, 1)]
    table, buffer = pack.box_table(boxes, torch.device("cpu")), torch.randn(6, 3)
    assert table.shape == (3, 7) and pack.box_table([], torch.device("cpu")).shape == (0, 7)
    found, wanted = (torch.empty(2, 2, 3) for _ in range(2))
    pack.unpack_boxes(buffer[1:5], table, [found])
    for tensor, row, rows, head, heads, start, stride in boxes:
        assert tensor == 0 and heads == 1
        for i in range(rows):
            wanted[row + i, head] = buffer[1 + start + i * stride]
    assert torch.equal(found, wanted)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_each_token_gets_its_row(texts: int, visuals: int, width: int, generator) -> None:
    """And the gradient of a row is that of its token; rows without a token get 0."""
    rows = [*range(visuals), *(-1 - s for s in range(texts))]
    chosen = generator.sample(rows, generator.randint(0, len(rows))) + [-1 - texts] * generator.randint(0, 3)
    generator.shuffle(chosen)
    index = torch.tensor(chosen, dtype=generator.choice([torch.int32, torch.int64]))
    text, visual = (torch.randn(count, width).requires_grad_() for count in (texts, visuals))
    found = splice.splice(text, visual, index)
    assert found.shape == (len(chosen), width)
    weights = torch.randn(len(chosen), width)
    found.backward(weights)
    text_grad, visual_grad = torch.zeros(texts, width), torch.zeros(visuals, width)
    for token, row in enumerate(chosen):
        expected = visual[row] if row >= 0 else text[-1 - row] if row > -1 - texts else torch.zeros(width)
        assert torch.equal(found[token], expected)
        if row >= 0:
            visual_grad[row] = weights[token]
        elif row > -1 - texts:
            text_grad[-1 - row] = weights[token]
    assert torch.equal(text.grad, text_grad) and torch.equal(visual.grad, visual_grad)


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("text", "visual", "index", "field", "found"),
    [
        (torch.zeros(2), ZEROS, [0], "text, visual", r"float32 \(2,\) and torch.float32 \(2, 3\)"),
        (ZEROS, torch.zeros(2, 3, 1), [0], "text, visual", r"\(2, 3\) and torch.float32 \(2, 3, 1\)"),
        (ZEROS, torch.zeros(2, 4), [0], "text, visual", r"\(2, 3\) and torch.float32 \(2, 4\)"),
        (ZEROS, ZEROS.double(), [0], "text, visual", "float32 .* and torch.float64"),
        (ZEROS, ZEROS, [[0]], "index", r"torch.int64 of shape \(1, 1\)"),
        (ZEROS, ZEROS, [0.0], "index", r"torch.float32 of shape \(1,\)"),
        (ZEROS, ZEROS, [0, 2, 1], "index", r"\[0, 2\] as the least and the greatest of 3"),
        (ZEROS, ZEROS, [-4, -1], "index", r"\[-4, -1\] as the least"),
        (ZEROS, ZEROS, [1, -2, 1], "index", r"\[-2, 1\] as the least"),
        (ZEROS, ZEROS, [-2, 0, -2], "index", "different rows of 2 visual rows .* and 2 rows of text"),
    ],
)
def test_what_does_not_fit_is_named(text: Tensor, visual: Tensor, index: list, field: str, found: str) -> None:
    with pytest.raises(InputError, match=found) as raised:
        splice.splice(text, visual, torch.tensor(index))
    assert raised.value.field == field


def test_rows_of_0_and_no_token_fit() -> None:
    assert splice.splice(ZEROS, ZEROS, torch.tensor([-3, -3])).tolist() == [[0.0] * 3] * 2
    assert splice.splice(ZEROS, ZEROS, torch.tensor([], dtype=torch.int64)).shape == (0, 3)
    with mock.patch.dict(os.environ, TRITON_SP_DEBUG="1"), pytest.raises(InputError):
        splice.splice(ZEROS, ZEROS, torch.tensor([5]))


def test_results_without_numbers_have_their_shapes() -> None:
    text, visual = torch.zeros(5, 3, device="meta"), torch.zeros(4, 3, device="meta")
    assert splice._splice(text, visual, torch.zeros(7, device="meta").long()).shape == (7, 3)
    grads = splice._splice_backward(torch.zeros(7, 3, device="meta"), torch.zeros(7, device="meta").long(), 5, 4)
    assert [grad.shape for grad in grads] == [(5, 3), (4, 3)]
