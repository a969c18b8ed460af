"""Decoders with recurrent layers: parity both ways, ranks without tokens or without heads, what travels, mutants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kit import parity, tiny, zoo
from kit.parity import TOLERANCE, Plan

import triton_sp
from triton_sp import SPConfig
from triton_sp.plan import stream
from triton_sp.plan.recurrence import Carry, Halo, carry
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.ranks import collectives
from triton_sp.wrappers.layers import recurrence, recurrent
from triton_sp.wrappers.layers.rules import Affine, Recurrence

# Heads that ranks do not divide: 4 of 2 keys, 6 of 2 groups; in the long part 3, which leave one of 4 ranks without.
RUNS = [
    ("qwen3_5", 2, "states"),
    ("lfm2", 4, "states"),
    ("nemotron_h", 3, "states"),
    ("bamba", 4, "heads"),
    ("qwen3_5_vl", 2, "states"),
]
EVERY = [(case.name, size, way) for case in zoo.hybrid_cases() for size in (2, 3, 4) for way in ("states", "heads")]
MORE = [pytest.param(*run, marks=pytest.mark.long) for run in EVERY if run not in RUNS]


@pytest.mark.parametrize(("name", "size", "way"), [*RUNS, *MORE])
def test_parity(ranks, reference, name: str, size: int, way: Any) -> None:
    """Every batch, and checkpointing of both kinds, in float64."""
    case = zoo.CASES[name]
    config = SPConfig(plan="heads", recurrence=way, gradient="sum" if size == 3 else "mean")
    tricky = next(batch for batch in ("packed", "image_and_video", "left_pad") if batch in case.batches)
    plans = [Plan(batch, config=config) for batch in case.batches]
    plans += [Plan(tricky, kind, config) for kind in ("reentrant", "non_reentrant")]
    references = {batch: reference(name, batch) for batch in case.batches}
    for found in ranks.run(parity.run_all, name, plans, references, ranks=size):
        for result in found:
            result.assert_within(TOLERANCE[case.dtype])


def few_tokens(dtype: torch.dtype) -> tiny.Batch:
    return tiny.collate([tiny.text_row(3, torch.Generator().manual_seed(0))], None)


def run_few(name: str, way: Any, path: Path) -> parity.Parity:
    case = zoo.CASES[name]
    with mock.patch.dict(zoo.CASES, {name: replace(case, batches={"few": few_tokens})}):
        return parity.run(zoo.CASES[name], Plan("few", config=SPConfig(plan="heads", recurrence=way)), path)


@pytest.mark.parametrize(("name", "way"), [("qwen3_5", "states"), ("bamba", "heads"), ("bamba", "states")])
def test_a_rank_without_tokens(ranks, tmp_path, name: str, way: Any) -> None:
    """Three tokens on four ranks."""
    parity.write_reference(replace(zoo.CASES[name], batches={"few": few_tokens}), "few", tmp_path / "few")
    for result in ranks.run(run_few, name, way, tmp_path / "few", ranks=4):
        result.assert_within(1e-10)


# --- what travels --------------------------------------------------------------------------------------------------


def sent(name: str, batch: str, config: SPConfig, repeated: int = 1) -> tuple[int, int, str]:
    """Exchanges of a forward and backward, the bytes that this rank sends, and what explain says about it."""
    case = zoo.CASES[name]
    model, inputs = case.build(case.dtype), case.batches[batch](case.dtype)
    triton_sp.wrap(model, config=config)
    inputs = {key: torch.cat([x] * repeated, 1) for key, x in inputs.items()}
    with collectives.record() as record:
        parity.loss_of(model(**inputs), None).backward()
    return record.count("exchange"), record.bytes, triton_sp.explain(model).rows[-1].last_batch


# Two recurrent layers and one that attends.
@pytest.mark.parametrize(
    ("name", "way", "forward"),
    [("lfm2", "states", 2 * 1 + 2), ("bamba", "states", 2 * (1 + 1) + 2), ("bamba", "heads", 2 * (1 + 2) + 2)],
)
def test_collectives_are_counted(ranks, name: str, way: Any, forward: int) -> None:
    """A layer: one exchange of what the convolution looks back to, then one of states, or heads there and back."""
    for count, _, said in ranks.run(sent, name, "plain", SPConfig(plan="heads", recurrence=way), ranks=3):
        assert count == 2 * forward
        assert name == "lfm2" or f"recurrent layers by {way}" in said, said


def test_documents_that_end_with_parts_send_nothing(ranks) -> None:
    for count, _, said in ranks.run(sent, "bamba", "right_pad", SPConfig(plan="segments"), ranks=2):
        assert count == 0
        assert "recurrent layers by local" in said, said


def recurrent_bytes(way: Any, repeated: int) -> int:
    """That this rank sends for recurrences, without attention and convolutions."""
    sizes: list[int] = []
    recur = recurrence.recur

    def counted(*args: Any) -> Any:
        with collectives.record() as record:
            out = recur(*args)
        sizes.append(record.bytes)
        return out

    with mock.patch.object(recurrence, "recur", counted):
        sent("bamba", "plain", SPConfig(plan="heads", recurrence=way), repeated)
    return sum(sizes)


def test_states_do_not_grow_with_tokens(ranks) -> None:
    for way, growth in (("states", 1), ("heads", 4)):
        short, long = (sum(ranks.run(recurrent_bytes, way, times, ranks=2)) for times in (1, 4))
        assert long == pytest.approx(growth * short, rel=0.05), way


# --- mutants -------------------------------------------------------------------------------------------------------


def one_segment(shards: Shards, segments: Segments, rank: int) -> Carry:
    """Documents are not told apart."""
    return carry(shards, Segments((0, shards.total)), rank)


def no_states(shards: Shards, segments: Segments, rank: int) -> Carry:
    return replace(carry(shards, segments, rank), senders=(), receivers=())


def no_halo(shards: Shards, segments: Segments, rank: int, reach: int) -> Halo:
    return Halo((range(0),) * len(shards.sizes), (0,) * len(shards.sizes), False)


def undecayed(self: Recurrence) -> Affine:
    """A state goes through a part as if no token of it forgot anything."""
    found = affine(self)
    return found._replace(mix=torch.ones_like(found.mix))


affine = Recurrence.affine
# name: the model and the batch that show it, the way, and what is replaced by what
MUTANTS: dict[str, tuple[str, str, Any, Any, str, Any]] = {
    "documents leak": ("bamba", "packed", "states", stream, "carry", one_segment),
    "documents leak, by heads": ("bamba", "packed", "heads", recurrence, "pieces", lambda segments, own: [own]),
    "documents leak, convolution": ("lfm2", "packed", "states", stream, "carry", one_segment),
    "no states": ("bamba", "plain", "states", stream, "carry", no_states),
    "no halo": ("lfm2", "plain", "states", recurrence, "halo", no_halo),
    "states undecayed": ("bamba", "plain", "states", Recurrence, "affine", undecayed),
    "padding counts": ("bamba", "left_pad", "states", recurrent, "_padding", lambda scope, hidden: None),
}


def run_mutant(mutant: str, path: Path) -> parity.Parity:
    name, batch, way, owner, attribute, broken = MUTANTS[mutant]
    with mock.patch.object(owner, attribute, broken):
        return parity.run(zoo.CASES[name], Plan(batch, config=SPConfig(plan="heads", recurrence=way)), path)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_notices(ranks, reference, mutant: str) -> None:
    for result in ranks.run(run_mutant, mutant, reference(*MUTANTS[mutant][:2]), ranks=3):
        assert result.gradient > 1e-4, result
