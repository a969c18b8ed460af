"""The stream of a batch, worked out for all tokens at once, held to a version that goes through them one by one."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sp import SPConfig
from triton_sp.errors import InputError
from triton_sp.loss import IGNORE, shift
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens
from triton_sp.ranks.groups import ALONE
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.kept import MOST, lay_out_again
from triton_sp.wrappers.inputs.layout import TextCall, gather_tokens, lay_out
from triton_sp.wrappers.install import Layouts

ROW = st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 3), st.lists(st.booleans(), min_size=12))


def one_by_one(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """The places of the stream's tokens, where segments start, and how many keys each has."""
    rows, length = batch.shape
    index, starts, used = [], [], []
    for row in range(rows):
        before: str = ""  # what the token before is, of this row
        for column in range(length):
            token = batch.mask is None or bool(batch.mask[row, column])
            padding = not token and batch.targets is not None and batch.targets[row, column] != IGNORE
            if not token and not padding:
                continue
            begins = batch.documents is not None and bool(batch.documents[row, column])
            if before != "token" or padding or begins:
                starts.append(len(index))
                used.append(0)
            used[-1] += token
            index.append(row * length + column)
            before = "token" if token else "padding"
    return index, [*starts, len(index)], used


def whole(segments: Segments) -> PlanChoice:
    return PlanChoice("heads", shard_tokens(segments.starts[-1], 1), "", {})


def laid_out(batch: Batch) -> TextCall:
    return lay_out(batch, None, ALONE, whole)


def batch_of(rows: list[tuple[int, int, int, list[bool]]], labelled: bool, packed: bool, masked: bool) -> Batch:
    """Rows of padding, tokens and padding; labels at some tokens, which the token or padding before predicts."""
    length = max(sum(row[:3]) for row in rows)
    mask, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORE)
    documents = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (left, tokens, _, chosen) in enumerate(rows):
        mask[i, left : left + tokens] = 1
        for column in range(left, left + tokens):
            labels[i, column] = 5 if chosen[column % 12] else IGNORE
            documents[i, column] = chosen[(column + 5) % 12]
    if not masked:
        mask.fill_(1)
    return Batch(
        torch.zeros_like(mask), mask if masked else None, documents if packed else None, None, None,
        labels if labelled else None, shift(labels) if labelled else None, None,
    )  # fmt: skip


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), st.booleans(), st.booleans(), st.booleans())
def test_the_stream_is_that_of_the_loop(rows, labelled: bool, packed: bool, masked: bool) -> None:
    batch = batch_of(rows, labelled, packed, masked)
    index, starts, used = one_by_one(batch)
    if not index:
        with pytest.raises(InputError, match="only padding"):
            laid_out(batch)
        return
    call = laid_out(batch)
    assert call.index.tolist() == index
    assert call.stream.cu_seqlens.tolist() == starts == list(call.stream.segments.starts)
    lengths = [b - a for a, b in pairwise(starts)]
    keys = call.stream.seqused_k
    assert (lengths if keys is None else keys.tolist()) == used


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_a_hole_is_found_where_it_is(rows: list[list[bool]]) -> None:
    """The first padding with tokens on both sides, in the order of reading."""
    holes = [
        (row, column)
        for row, kept in enumerate(rows)
        for column in range(6)
        if not kept[column] and any(kept[:column]) and any(kept[column:])
    ]
    batch = Batch(torch.zeros(len(rows), 6), torch.tensor(rows).long(), *[None] * 6)
    if not any(map(any, rows)):
        return
    if holes:
        with pytest.raises(InputError, match="a hole in row {} at column {}".format(*holes[0])):
            laid_out(batch)
    else:
        laid_out(batch)


@pytest.mark.parametrize("column", [3, 4])
def test_a_label_behind_the_tokens_is_refused(column: int) -> None:
    mask, labels = torch.tensor([[1, 1, 0, 0, 0]]), torch.full((1, 5), IGNORE)
    labels[0, column] = 4
    batch = Batch(torch.zeros(1, 5), mask, None, None, None, labels, shift(labels), None)
    with pytest.raises(InputError, match=f"a label in row 0 at column {column}, predicted from padding"):
        laid_out(batch)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.lists(ROW, min_size=1, max_size=3), *[st.booleans()] * 3), min_size=2, max_size=7))
def test_a_layout_that_was_kept_is_that_of_its_batch(batches) -> None:
    """Of batches one after another, each twice; and a layout of another device or dtype is forgotten."""
    layouts = Layouts()
    for number, (rows, *kinds) in enumerate(batches):
        batch = batch_of(rows, *kinds)
        if not one_by_one(batch)[0]:
            continue
        fresh = laid_out(batch)
        how = "how" if number < 5 else "another"
        first, second = (lay_out_again(layouts, how, batch, None, ALONE, whole) for _ in range(2))
        assert first.stream is second.stream and first.tally is not second.tally
        for kept in (first, second):
            assert kept.mask is batch.mask and kept.shape == fresh.shape and kept.choice == fresh.choice
            assert kept.index.tolist() == fresh.index.tolist()
            assert kept.stream.segments == fresh.stream.segments and kept.stream.shards == fresh.stream.shards
            keys, expected = kept.stream.seqused_k, fresh.stream.seqused_k
            assert (None if keys is None else keys.tolist()) == (None if expected is None else expected.tolist())
        assert 0 < len(layouts) <= MOST and {key[0] for key in layouts} == {how}
    assert not copy.deepcopy(layouts) and not pickle.loads(pickle.dumps(layouts))


@pytest.mark.parametrize(("gradient", "share"), [("mean", 1.0), ("sum", 0.5)])
def test_what_tokens_have_is_put_where_they_stand(gradient: str, share: float) -> None:
    """0 at padding; and of the gradient, which each of the two ranks forms, a rank's part."""
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    call = laid_out(Batch(torch.zeros(3, 4), mask, *[None] * 6))
    local = torch.randn(1, 7, 5).requires_grad_()
    installation: Any = SimpleNamespace(config=SPConfig(gradient=gradient), group=SimpleNamespace(size=2))
    found = gather_tokens(local, call, installation)
    weights, vectors = torch.randn(3, 4, 5), iter(local[0])
    (found * weights).sum().backward()
    for row in range(3):
        for column in range(4):
            assert torch.equal(found[row, column], next(vectors) if mask[row, column] else torch.zeros(5))
    torch.testing.assert_close(local.grad[0], share * weights[mask.bool()])
