"""What is sent: two exchanges an attention layer each way and a gather a tower, of exactly the bytes that must move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo

import triton_sp
from triton_sp import stages
from triton_sp.loss import shift
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.ranks import collectives, groups
from triton_sp.ranks.collectives import Ledger


@dataclass
class Sent:
    """Of one step on one rank: the entries of the forward, of the backward, and the sizes of the batch."""

    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]
    tokens: int


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    """Heads exchanged, whatever the cost model thinks of models this small."""
    return triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads"))


def step(name: str, batch_name: str, **options: bool) -> Sent:
    case = zoo.CASES[name]
    model, batch = wrap(case.model()), case.batch(batch_name)
    with collectives.record() as forward:
        loss = tiny.loss_of(model(**batch, **options))
    with collectives.record() as backward:
        loss.backward()
    if "labels" not in batch:
        tower = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
        tokens = tower(batch["pixel_values"]).flatten(2).shape[-1] * len(batch["pixel_values"])
    else:
        mask = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
        tokens = int((mask | (shift(batch["labels"]) != -100)).sum())
    return Sent(forward.entries, backward.entries, tokens)


def kinds(entries: list[tuple[str, int]]) -> Counter[str]:
    return Counter(name for name, _ in entries)


def bytes_of(entries: list[tuple[str, int]], name: str) -> list[int]:
    return [size for entry, size in entries if entry == name]


LAYERS = {"llama": 2, "gemma": 2, "mistral": 2, "phi3_longrope": 2, "gpt_neox": 2}


@pytest.mark.parametrize("name", LAYERS)
def test_decoder(ranks, name: str) -> None:
    """A message for agreement, in the backward too, and one for the loss; nothing for masks, positions or sizes."""
    for sent in ranks.run(step, name, "left_pad", ranks=2):
        assert kinds(sent.forward) == {"agree": 1, "exchange": 2 * LAYERS[name], "all_reduce": 1}
        assert kinds(sent.backward) == {"agree": 1, "exchange": 2 * LAYERS[name]}


@pytest.mark.parametrize("name", ["vit", "siglip_vision", "dinov2"])
def test_tower(ranks, name: str) -> None:
    for sent in ranks.run(step, name, "many_images", ranks=2):
        assert kinds(sent.forward) == {"agree": 1, "exchange": 4, "gather": 1}
        assert kinds(sent.backward) == {"agree": 1, "exchange": 4, "gather": 1}


def towers_of(name: str) -> Counter[str]:
    """The forward of a batch with images less that of one without: what the tower sends."""
    sent = {batch: kinds(step(name, batch).forward) for batch in ("plain", "no_images")}
    return sent["plain"] - sent["no_images"]


def test_tower_of_a_composite(ranks) -> None:
    """Six for three blocks, and one for what goes to the placeholders: in Qwen3-VL of two more levels. LLaVA's image is
    embedded and projected on one rank: its tokens go out to the blocks and come back from two of them; what each rank
    holds is told in small messages. Nothing is gathered."""
    assert ranks.run(towers_of, "qwen2_5_vl", ranks=2) == [{"exchange": 6 + 1}] * 2
    assert ranks.run(towers_of, "qwen3_vl", ranks=2) == [{"exchange": 6 + 3}] * 2
    assert ranks.run(towers_of, "llava", ranks=2) == [{"exchange": 6 + 1 + 3, "agree": 3}] * 2


def hidden_states_read(count: int) -> int:
    case = zoo.CASES["clip_vision"]
    model = wrap(case.model())
    with collectives.record() as ledger:
        out = model(**case.batch("plain"), output_hidden_states=True)
        for index in range(count):
            out.hidden_states[1 + 0 * index]
    return ledger.count("gather")


def test_hidden_states_are_gathered_when_read(ranks) -> None:
    assert ranks.run(hidden_states_read, 0, ranks=2) == [1, 1]
    assert ranks.run(hidden_states_read, 1, ranks=2) == [2, 2]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "kv_heads"), [("llama", 12), ("gemma", 1)])
def test_bytes(ranks, name: str, kv_heads: int, size: int) -> None:
    """Of T local tokens, q and a copy of k and v for each rank that needs them go out, but for the rank's own share;
    the results come back. The backward sends the same, the other way."""
    heads, head_dim, width = tiny.HEADS, 8, zoo.CASES[name].dtype.itemsize
    everyone = ranks.run(step, name, "plain", ranks=size)
    shards = shard_tokens(everyone[0].tokens, size)
    copies = max(kv_heads, size)  # a key/value head stands in the share of every rank that has one of its query heads
    for rank, sent in enumerate(everyone):
        tokens, total = shards.sizes[rank], shards.total
        inputs = tokens * (heads + 2 * copies) * (size - 1) // size * head_dim * width
        results = (total - tokens) * heads // size * head_dim * width
        assert bytes_of(sent.forward, "exchange") == [inputs, results] * LAYERS[name]
        back_results = tokens * heads * (size - 1) // size * head_dim * width
        back_inputs = (total - tokens) * (heads + 2 * copies) // size * head_dim * width
        assert bytes_of(sent.backward, "exchange") == [back_results, back_inputs] * LAYERS[name]


def reshard(source: Shards, target: Shards) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A stream 0, 1, 2 ... under another cut, and what comes back to its owners from gradients row * 10."""
    group = groups.resolve_group()
    own, goal = source.range(group.rank), target.range(group.rank)
    x = torch.arange(own.start, own.stop, dtype=torch.float64)[:, None].expand(-1, 3).clone().requires_grad_()
    with collectives.record() as ledger:
        moved = stages.reshard(x, source, target, group)
    moved.backward(10.0 * torch.arange(goal.start, goal.stop, dtype=torch.float64)[:, None].expand(-1, 3))
    return moved.detach(), x.grad, ledger.bytes


def test_reshard_moves_each_row_once_and_back(ranks) -> None:
    source, target = Shards((0, 5, 2)), Shards((4, 0, 3))
    for rank, (moved, grad, sent) in enumerate(ranks.run(reshard, source, target, ranks=3)):
        assert moved[:, 0].tolist() == list(target.range(rank))
        assert grad[:, 0].tolist() == [10 * row for row in source.range(rank)]
        assert sent == [0, 5, 0][rank] * 3 * 8
    assert all(sent == 0 for _, _, sent in ranks.run(reshard, source, source, ranks=3))


def test_ledger_sees_only_its_block() -> None:
    with collectives.record() as outer:
        with collectives.record() as inner:
            collectives._note("exchange", 3)
        collectives._note("gather", 4)
    collectives._note("gather", 5)
    assert (inner.entries, outer.count("gather"), outer.bytes) == ([("exchange", 3)], 1, 7)
    assert isinstance(outer, Ledger) and not dist.is_initialized()
