"""Parity with every plan forced in turn, and what each plan sends: collectives and bytes, counted."""

from __future__ import annotations

import host_reads
import pytest
from kit import parity, tiny, zoo
from kit.parity import Plan

import triton_sp
from triton_sp.ranks import collectives

MODELS = ["qwen2_5_vl", "qwen3_vl", "internvl", "vit", "llama"]


# Each model with each plan, on 2 ranks and on 3 in turn.
TURNS = [
    (name, plan, 2 + (i + j) % 2)
    for i, name in enumerate(MODELS)
    for j, plan in enumerate(["auto", "segments", "replicate"])
]


@pytest.mark.parametrize(("name", "plan", "size"), TURNS)
def test_parity(ranks, reference, name: str, plan: str, size: int) -> None:
    """("heads" is forced in test_parity.py, for all models; `make all-plans` has all models, plans and sizes.)"""
    case = zoo.CASES[name]
    config = parity.heads(size, plan=plan)
    batches = [b for b in case.batches if b in ("many_images", "image_and_video", "left_pad", "packed")]
    plans = [Plan(batch, config=config) for batch in batches]
    plans.append(Plan(batches[-1], checkpointing="non_reentrant", config=config))
    # Replicated, a tower's backward runs on each rank's share of the gradient, which Qwen's rotation and RMSNorm round
    # to float32: their sum has other digits than the whole.
    rounds = name.startswith("qwen") and plan != "segments"
    parity.hold(ranks, reference, name, plans, size, 1e-6 if rounds else None)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_parity_in_chunks(ranks, reference, name: str, size: int) -> None:
    """12 heads in 3 chunks on 2 ranks, in 4 on 3."""
    case = zoo.CASES[name]
    config = parity.heads(size, chunks=4)
    batches = list(case.batches)[:2]
    plans = [Plan(batch, config=config) for batch in batches]
    plans.append(Plan(batches[0], checkpointing="reentrant", config=config))
    parity.hold(ranks, reference, name, plans, size)


def ledger(name: str, batch_name: str, plan: str, chunks: int = 1) -> list[tuple[str, int]]:
    """What a forward and backward of the wrapped model sends from this rank."""
    case = zoo.CASES[name]
    model, batch = case.model(), case.batch(batch_name)
    triton_sp.wrap(model, config=triton_sp.SPConfig(plan=plan, chunks=chunks))
    with collectives.record() as record:
        parity.loss_of(model(**batch), None).backward()
    return record.entries


@pytest.mark.parametrize("size", [2, 4])
def test_heads_cost_two_exchanges_a_layer(ranks, size: int) -> None:
    """Of the bytes that the formula says: (P - 1) / P of the local q, k, v and outputs, and as many backward."""
    tokens, heads, dim, layers, itemsize = 5 * 37, tiny.HEADS, 4, 2, 8
    found = ranks.run(ledger, "vit", "many_images", "heads", ranks=size)
    sizes = [tokens // size + (rank < tokens % size) for rank in range(size)]
    for rank, entries in enumerate(found):
        exchanges = [sent for name, sent in entries if name == "exchange"]
        assert len(exchanges) == 2 * 2 * layers
        first = 3 * sizes[rank] * heads * dim * (size - 1) // size * itemsize
        second = (tokens - sizes[rank]) * heads // size * dim * itemsize
        assert exchanges == [first, second] * layers + [second_back for _ in range(layers) for second_back in (
            sizes[rank] * heads * dim * (size - 1) // size * itemsize,
            3 * (tokens - sizes[rank]) * heads // size * dim * itemsize,
        )]  # fmt: skip


def test_chunks_send_the_same_bytes(ranks) -> None:
    whole = ranks.run(ledger, "vit", "many_images", "heads", ranks=2)
    chunked = ranks.run(ledger, "vit", "many_images", "heads", 3, ranks=2)
    for one, other in zip(whole, chunked, strict=True):
        sent = [[size for name, size in entries if name == "exchange"] for entries in (one, other)]
        assert sum(sent[0]) == sum(sent[1]) and 3 * len(sent[0]) == len(sent[1])


@pytest.mark.parametrize("plan", ["segments", "replicate"])
def test_local_plans_exchange_nothing(ranks, plan: str) -> None:
    for entries in ranks.run(ledger, "vit", "many_images", plan, ranks=4):
        names = [name for name, _ in entries]
        assert names.count("exchange") == 0
        assert names.count("gather") == (2 if plan == "segments" else 0)  # at the tower's end, and its backward


@pytest.mark.parametrize(
    ("heads", "plan", "reads"), [((4, 2), "heads", 0), ((5, 5), "heads", 1), ((4, 2), "segments", 1)]
)
def test_no_layer_asks_the_device(ranks, heads: tuple[int, int], plan: str, reads: int) -> None:
    """Where heads are cut, or shards end with segments, these are read once for all layers; else not even that."""
    for layers in (1, 5):
        for found in ranks.run(host_reads.count, *heads, plan, layers, ranks=2):
            assert found == ({"stream.tolist": reads} if reads else {})


def test_windowed_layers_exchange_nothing(ranks) -> None:
    """Qwen2.5-VL: of 3 layers the one that sees whole images exchanges, forward and backward; so does the decoder."""
    case = zoo.CASES["qwen2_5_vl"]
    heads = ranks.run(ledger, case.name, "plain", "heads", ranks=2)
    windows = ranks.run(ledger, case.name, "plain", "segments", ranks=2)
    for before, after in zip(heads, windows, strict=True):
        assert [name for name, _ in before].count("exchange") - [name for name, _ in after].count(
            "exchange"
        ) == 2 * 2 * 2
