"""Tokens of a causal batch that see one another, and segments of some layers, as `lay_out` finds them: by loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import laid_out

from triton_sp.anatomy.parts import Spans
from triton_sp.errors import InputError
from triton_sp.loss import shift
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.shards import shard_tokens
from triton_sp.ranks.groups import ALONE
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.layout import UNTOUCHED, TextCall, lay_out


def batch_of(mutual: list[list[int]], **fields: list[list[int]]) -> Batch:
    named = dict.fromkeys(("mask", "documents", "chunks", "mutual", "labels", "targets"))
    named |= {name: torch.tensor(rows) for name, rows in (fields | {"mutual": mutual}).items()}
    named |= {name: named[name].bool() for name in ("documents", "chunks", "mutual") if named[name] is not None}
    if fields.get("labels"):
        named["targets"] = shift(named["labels"])
    like = torch.zeros(len(mutual), len(mutual[0]), dtype=torch.long)
    return Batch(tokens=like, items=None, **named)


def with_spans(batch: Batch, spans: Spans) -> TextCall:
    return lay_out(batch, spans, ALONE, lambda s: PlanChoice("heads", shard_tokens(s.starts[-1], 1), "", {}))


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_spans_are_the_runs_of_marked_tokens(rows: list[list[bool]], cut: bool, causal_layers: bool) -> None:
    """A run of one token sees no more than it would alone; no run passes from row to row."""
    spans = Spans((1,), cut=cut, causal_layers="full" if causal_layers else None)
    call = with_spans(batch_of(rows), spans)
    expected = []
    for row, marked in enumerate(rows):
        start = None
        for column, mark in enumerate([*marked, False]):
            if mark and start is None:
                start = column
            elif not mark and start is not None:
                if column - start > 1:
                    expected.append(range(7 * row + start, 7 * row + column))
                start = None
    found = call.stream.segments
    assert found.spans == tuple(expected) and found.cut_spans == cut
    assert found.starts == tuple(range(0, 7 * len(rows) + 1, 7))
    if causal_layers and expected:
        assert call.by_layer_type.keys() == {"full"}
        assert (
            call.by_layer_type["full"].segments.spans == ()
            and call.by_layer_type["full"].segments.starts == found.starts
        )
    else:
        assert call.by_layer_type == {}
    assert call.mask is not None and call.mask.shape == UNTOUCHED.shape


def test_padding_is_not_counted() -> None:
    call = with_spans(
        batch_of([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]], mask=[[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), Spans((1,))
    )
    assert call.stream.segments.spans == (range(1, 3), range(4, 7)) and call.stream.segments.starts == (0, 4, 7)
    assert call.index.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_without_marks_there_are_none() -> None:
    batch = batch_of([[1, 1, 0]])
    assert laid_out(batch).stream.segments.spans == () and laid_out(batch).mask is None
    unmarked = Batch(**{**vars(batch), "mutual": None})
    assert with_spans(unmarked, Spans((1,))).stream.segments.spans == ()


def refused(batch: Batch, spans: Spans) -> InputError:
    with pytest.raises(InputError) as raised:
        with_spans(batch, spans)
    return raised.value


def test_a_document_must_not_start_in_a_span() -> None:
    marks = [[0, 0, 0, 0], [1, 1, 1, 0]]
    error = refused(batch_of(marks, documents=[[1, 0, 0, 0], [1, 0, 1, 0]]), Spans((1,)))
    assert (error.field, error.found) == ("position_ids", "a document that starts inside a span, in row 1")
    fine = with_spans(batch_of(marks, documents=[[1, 0, 0, 0], [1, 0, 0, 1]]), Spans((1,)))
    assert fine.stream.segments.starts == (0, 4, 7, 8)


def test_a_prefix_is_one_run_a_row() -> None:
    single = Spans((0,), single=True, types="token_type_ids")
    error = refused(batch_of([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]), single)
    assert (error.field, error.found) == ("token_type_ids", "2 in row 1")
    assert "one run of 0 in each row" in str(error)
    assert len(with_spans(batch_of([[1, 1, 0], [0, 1, 1]]), single).stream.segments.spans) == 2


def test_a_prediction_from_padding_that_sees_tokens_is_refused() -> None:
    """The last padding before a row predicts its first token. In a span it would see tokens."""
    fields = {"mask": [[1, 1, 1, 1], [0, 1, 1, 1]], "labels": [[-100, 2, 3, 4], [-100, 5, 6, 7]]}
    error = refused(batch_of([[0, 0, 0, 0], [1, 1, 0, 0]], **fields), Spans((1,)))
    assert error.field == "labels" and error.found == "a label in row 1, predicted from padding that sees tokens"
    assert with_spans(batch_of([[0, 0, 0, 0], [0, 1, 1, 0]], **fields), Spans((1,))).stream.segments.spans == (
        range(5, 7),
    )


def test_layers_with_chunks_have_segments_of_their_own() -> None:
    fields = {"mask": [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], "labels": [[-100, 5, 1, 1, 1], [-100, 1, 1, -100, -100]]}
    call = laid_out(batch_of([[0] * 5] * 2, chunks=[[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], **fields))
    chunked = call.by_layer_type["chunked_attention"]
    assert call.stream.segments.starts == (0, 1, 5, 8) and chunked.segments.starts == (0, 1, 3, 5, 8)
    assert call.stream.seqused_k.tolist() == [0, 4, 3] and chunked.seqused_k.tolist() == [0, 2, 2, 3]
    assert call.stream.seqused_k.dtype == torch.int32 == call.stream.cu_seqlens.dtype
    assert call.local_index.tolist() == call.index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
