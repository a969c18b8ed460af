"""Packed samples of text and pictures: the loss and the gradients of the samples by themselves."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kit import tiny, zoo
from kit.parity import Step, assert_close, gradients, in_dtype_of, step
from torch import Tensor, nn

import triton_sp
from triton_sp.errors import InputError, UnsupportedModelError

# By how a family takes pictures and positions. What is left out of the suite is like one of these.
FAMILIES = ("qwen3_vl", "llava_onevision", "idefics3", "gemma3", "lfm2_vl")
ALIKE = (
    *("qwen2_vl", "qwen2_5_vl", "glm4v", "qwen3_5_vl", "qwen3_vl_moe", "ernie4_5_vl_moe"),
    *("llava", "llava_next", "internvl", "mistral3", "smolvlm", "idefics2", "llama", "gpt2"),
)


def samples(name: str) -> list[dict[str, Any]]:
    """Two with a picture, one of text alone, and, where the family has them, one with a video; padded rows too.

    GLM-4V has the same placeholders for pictures and videos, and takes no batch with both.
    """
    case = zoo.CASES[name]
    first = case.batch("plain")
    again = {key: value * 0.5 if value.is_floating_point() else value for key, value in first.items()}
    again["input_ids"] = torch.where(first["input_ids"] >= tiny.FIRST_TEXT, 93 - first["input_ids"], first["input_ids"])
    text = tiny.text_batch("left_pad", case.dtype)
    text = {key: value[:1] for key, value in text.items()}
    video = case.batch("video") if "video" in case.batches and name != "glm4v" else {}
    rows = {
        key: value[:1] if key in ("input_ids", "labels", "attention_mask") else value for key, value in video.items()
    }
    rows = {key: value[:1] if key == "mm_token_type_ids" else value for key, value in rows.items()}
    return [first, text, again, *([rows] if rows else [])]


def alone(model: nn.Module, rows: list[dict[str, Any]]) -> Step:
    """Each sample in a call of its own, without its padding; the mean over all labels."""
    model.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        keep = row.get("attention_mask", torch.ones_like(row["input_ids"]))[0] != 0
        tokens = {key for key, x in row.items() if x.shape == row["input_ids"].shape}
        own = {key: x[:, keep] if key in tokens else x for key, x in row.items() if key != "attention_mask"}
        labels = F.pad(own.pop("labels")[0, 1:], (0, 1), value=-100)
        total = total + F.cross_entropy(model(**own).logits[0].double(), labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return (total / count).detach(), gradients(model)


def packed_step(name: str, batch: dict[str, Tensor]) -> Step:
    with in_dtype_of(zoo.CASES[name]):
        model = triton_sp.wrap(zoo.CASES[name].model(), config=triton_sp.SPConfig(plan="heads", trial="off"))
        return step(model, batch)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in ALIKE)])
def test_as_the_samples_by_themselves(ranks, name: str) -> None:
    case, rows = zoo.CASES[name], samples(name)
    with in_dtype_of(case):
        model = case.model()
        collate = pickle.loads(pickle.dumps(triton_sp.PackingCollator(model)))
        assert len(pickle.dumps(collate)) < 100_000, "no weights travel to the workers of a loader"
        batch, expected = collate(rows), alone(model, rows)
    for found in ranks.run(packed_step, name, batch, ranks=2):
        assert_close(found, expected, 1e-10 if case.dtype == torch.float64 else 1e-5)


def test_collate_is_called_with_one_sample() -> None:
    seen = []

    def collate(given: list[str]) -> dict[str, Tensor]:
        seen.append(given)
        ids = torch.tensor([[5, len(given[0]), 0]])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1, 1, 0]])}

    batch = triton_sp.PackingCollator(zoo.CASES["llama"].model(), collate)(["sample", "one more"])
    assert seen == [["sample"], ["one more"]]
    assert batch["input_ids"].tolist() == [[5, 6, 5, 8]] and batch["labels"].tolist() == [[-100, 6, -100, 8]]


def test_axes_of_positions() -> None:
    """One image, 5 + 5 placeholders high and wide, between text: all rows begin anew with each document."""
    positions = triton_sp.PackingCollator(zoo.CASES["qwen2_5_vl"].model())(samples("qwen2_5_vl")[:2])["position_ids"]
    lengths = [samples("qwen2_5_vl")[0]["input_ids"].shape[1], 18]
    assert positions.shape == (4, 1, sum(lengths))
    assert positions[0, 0].tolist() == [*range(lengths[0]), *range(18)]
    assert positions[1:, 0, : lengths[0]].max() < lengths[0] - 1 and positions[1:, 0, -18:].eq(torch.arange(18)).all()


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        ({"text": "words"}, "sample"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "sample"),
        ({"input_ids": [1, 2], "note": "words"}, "note"),
    ],
)
def test_refused_samples(sample: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        triton_sp.PackingCollator(zoo.CASES["llama"].model())([sample])


@pytest.mark.parametrize(("name", "found"), [("clip_vision", "found none"), ("opt", "whose mask does not")])
def test_refused_models(name: str, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=found):
        triton_sp.PackingCollator(zoo.CASES[name].model())


def test_refused_fields() -> None:
    mask = torch.ones(1, 5, 1, 4)
    with pytest.raises(InputError, match="cross_attention_mask"):
        triton_sp.PackingCollator(zoo.CASES["llama"].model())(
            [{"input_ids": torch.ones(1, 5, dtype=torch.long), "cross_attention_mask": mask}]
        )
