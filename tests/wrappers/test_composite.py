"""The fusion between vision and text: what users freeze, make themselves, or get wrong. Parity of every family is in
test_parity.py, what is held in test_memory.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.errors import DisagreementError, InputError
from triton_sp.ranks import collectives, groups
from triton_sp.testing import RankError

Batch = dict[str, Any]


def compare(name: str, batch: str, change: Callable[[nn.Module, Batch], Batch]) -> None:
    """A step of the wrapped model against one of the model itself, both given the changed batch."""
    case = zoo.CASES[name]
    model, wrapped = case.model(), case.model()
    expected = parity.exact_step(model, change(model, case.batch(batch)))
    changed = change(wrapped, case.batch(batch))
    triton_sp.wrap(wrapped, config=parity.heads(dist.get_world_size()))
    parity.assert_close(parity.step(wrapped, changed), expected, 1e-10)


def freeze_tower(model: Any, batch: Batch) -> Batch:
    model.get_encoder(modality="image").requires_grad_(False)
    return batch


def freeze_text(model: Any, batch: Batch) -> Batch:
    model.get_decoder().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    return batch


def make_features(model: Any, batch: Batch) -> Batch:
    """Made once by the model's own method, without a gradient."""
    batch = dict(batch)
    grid = {"image_grid_thw": batch["image_grid_thw"]} if "image_grid_thw" in batch else {}
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=batch.pop("pixel_values"), **grid, return_dict=True)
    return batch | {"mm_encoder_outputs": {"image": features}}


def embed(model: Any, batch: Batch) -> Batch:
    """The caller embeds the ids: placeholders are known by their embedding then."""
    batch = dict(batch)
    with torch.no_grad():
        return batch | {"inputs_embeds": model.get_input_embeddings()(batch.pop("input_ids"))}


def images_last(model: Any, batch: Batch) -> Batch:
    """Text, then images: the first rank has no placeholder."""
    ids = batch["input_ids"]
    order = (ids == tiny.IMAGE).int().argsort(dim=1, stable=True)
    moved = {
        name: batch[name].gather(1, order) for name in ("input_ids", "labels", "mm_token_type_ids") if name in batch
    }
    return batch | moved


CASES = {
    "frozen_tower": ("qwen2_5_vl", "image_and_video", freeze_tower),
    "frozen_tower_images": ("llava", "left_pad", freeze_tower),
    "frozen_text": ("qwen3_vl", "image_and_video", freeze_text),
    "frozen_text_images": ("internvl", "right_pad", freeze_text),
    "own_features": ("qwen3_vl", "plain", make_features),
    "own_features_images": ("llava", "plain", make_features),
    "own_embeddings": ("llava", "left_pad", embed),
    "images_last": ("qwen2_vl", "plain", images_last),
    "images_last_images": ("internvl", "plain", images_last),
}


@pytest.mark.parametrize("name", CASES)
def test_seam(ranks, name: str) -> None:
    size = 3 if name.endswith("images") else 2
    ranks.run(compare, *CASES[name], ranks=size)


def lose_placeholder(name: str) -> None:
    """One placeholder fewer than features."""
    model, batch = zoo.CASES[name].model(), zoo.CASES[name].batch("plain")
    spot = (batch["input_ids"] == tiny.IMAGE).nonzero()[0].tolist()
    batch["input_ids"][spot[0], spot[1]] = tiny.FIRST_TEXT
    triton_sp.wrap(model)(**batch)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "mistral3"])
def test_placeholders_that_do_not_match(ranks, name: str) -> None:
    """On every rank, whether the features are counted before they are made or after."""
    with pytest.raises(RankError) as caught:
        ranks.run(lose_placeholder, name, ranks=3)
    assert len(caught.value.errors) == 3
    for error in caught.value.errors.values():
        assert isinstance(error, InputError) and error.field == "image_token"
        assert "placeholders" in error.expected


def tell(number: int) -> None:
    """The last rank says that it has so many images."""
    ask, asked = collectives.integers_of_all, 0

    def lie(values: list[int], group: groups.Group) -> list[list[int]]:
        nonlocal asked
        asked += len(values) == 1  # the ranks' agreement before it sends three
        return ask([number] if len(values) == asked == 1 and group.rank == group.size - 1 else values, group)

    model, batch = zoo.CASES["llava"].model(), zoo.CASES["llava"].batch("plain")
    triton_sp.wrap(model)
    with mock.patch.object(collectives, "integers_of_all", lie):
        model(**batch)


def test_images_that_there_cannot_be(ranks) -> None:
    """No memory is taken for what another rank only says that it has."""
    with pytest.raises(RankError) as caught:
        ranks.run(tell, 10**12, ranks=2)
    for error in caught.value.errors.values():
        assert isinstance(error, DisagreementError) and "1000000000000 images" in error.found
