"""`generate` with a prompt that runs sharded: token for token what one process generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo
from promises import memory

import triton_sp
from triton_sp.errors import DisagreementError, InputError
from triton_sp.testing import RankError

GREEDY = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
WAYS = {
    "greedy": GREEDY,
    "sampled": GREEDY | {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "beams": GREEDY | {"num_beams": 2},
    "no_cache": GREEDY | {"use_cache": False},
}


def prompt_of(name: str, batch: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in zoo.CASES[name].batch(batch).items() if key != "labels"}


def generated(model: Any, prompt: dict[str, torch.Tensor], way: str) -> torch.Tensor:
    torch.manual_seed(5)
    never = [tiny.IMAGE, tiny.VIDEO]  # a placeholder without a feature
    return model.generate(**prompt, **WAYS[way], pad_token_id=tiny.PAD, suppress_tokens=never)


def compare(name: str, batches: list[str], ways: list[str]) -> list[tuple[str, str]]:
    """Where a rank's tokens are other ones than those of the model by itself."""
    model, different = zoo.CASES[name].model(), []
    for batch in batches:
        prompt = prompt_of(name, batch)
        expected = {way: generated(model, prompt, way) for way in ways}
        triton_sp.wrap(model, config=triton_sp.SPConfig(shard_prefill=True, plan="heads"))
        for way in ways:
            with triton_sp.ranks.collectives.record() as ledger:
                found = generated(model, prompt, way)
            assert ledger.count("exchange"), f"{way} not sharded"
            if not torch.equal(found, expected[way]):
                different.append((batch, way))
        triton_sp.unwrap(model)
    return different


@pytest.mark.parametrize(("name", "size", "ways"), [("qwen2_5_vl", 2, ["greedy", "sampled"]), ("llava", 3, WAYS)])
def test_tokens(ranks, name: str, size: int, ways: list[str]) -> None:
    assert ranks.run(compare, name, ["left_pad"], list(ways), ranks=size) == [[]] * size


@pytest.mark.parametrize(("name", "batch"), [("phi3_longrope", "left_pad"), ("llama", "packed")])
def test_tokens_of_text(ranks, name: str, batch: str) -> None:
    """Phi-3 starts without a cache and is given one; positions tell of no documents where a cache is filled."""
    assert ranks.run(compare, name, [batch], ["greedy"], ranks=2) == [[]] * 2


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if case.kind != "vision"])
def test_every_family(ranks, name: str) -> None:
    """Or explain says why its prompt stays whole."""
    case = zoo.CASES[name]
    model = triton_sp.explain(case.model(), ranks=2)
    batches = [batch for batch in case.batches if batch != "right_pad"]
    if "recurrent" not in str(model):
        assert ranks.run(compare, name, batches, list(WAYS), ranks=2, timeout=900) == [[]] * 2


def explained(name: str, shard_prefill: bool) -> str:
    model: Any = triton_sp.wrap(zoo.CASES[name].model(), config=triton_sp.SPConfig(shard_prefill=shard_prefill))
    prompt = prompt_of(name, "plain")
    if (not shard_prefill or name == "lfm2") and dist.get_rank() == 0:  # alone
        generated(model, prompt, "greedy")
    return triton_sp.explain(model).prefill


def test_it_is_told(ranks) -> None:
    assert ranks.run(explained, "llama", False, ranks=2)[0].startswith("each rank by itself")
    assert ranks.run(explained, "llama", True, ranks=2)[0].startswith("all ranks together, sharded")
    assert "recurrent layers keep states" in ranks.run(explained, "lfm2", True, ranks=2)[0]


def refused(wrong: str) -> None:
    model = triton_sp.wrap(zoo.CASES["llama"].model(), config=triton_sp.SPConfig(shard_prefill=True))
    prompt = prompt_of("llama", "right_pad" if wrong == "attention_mask" else "plain")
    if wrong == "input_ids":
        prompt["input_ids"] = prompt["input_ids"].roll(dist.get_rank(), 1)
    generated(model, prompt, "greedy")


@pytest.mark.parametrize(("wrong", "kind"), [("attention_mask", InputError), ("input_ids", DisagreementError)])
def test_refused_on_every_rank(ranks, wrong: str, kind: type) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(refused, wrong, ranks=2)
    assert len(raised.value.errors) == 2
    for error in raised.value.errors.values():
        assert isinstance(error, kind) and wrong in str(error)


def test_memory(ranks) -> None:
    """What lives beside the cache while a prompt runs is a P-th of that of one process."""
    alone, whole = memory.usual_prefill_peak(False)
    for size in (2, 4):
        peak, cache = max(ranks.run(memory.usual_prefill_peak, True, ranks=size))
        assert cache == whole and peak * size < 1.05 * alone


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_memory_of_attention(ranks, name: str) -> None:
    """Where attention is the widest, what is sent lies beside what arrives: less is saved."""
    (two, cache), *_ = ranks.run(memory.prefill_peak, name, True, ranks=2)
    four = max(peak for peak, _ in ranks.run(memory.prefill_peak, name, True, ranks=4))
    alone, whole = memory.prefill_peak(name, False)
    assert cache == whole
    assert 2 * two < 1.7 * alone and 4 * four < 1.7 * alone
    print(name, alone, two, four, cache)
