"""Towers that are not sharded run on a rank's own images where features are routed: also where the patches of all
images lie in one strip, or are pointed at. `explain` says so, and not of what other methods or the forward call too.
Towers whose blocks are sharded may be given a rank's own images too."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import Tensor, nn
from zoo.batches import Batch, noise, text_batch
from zoo.build import build

import triton_sp
from triton_sp.anatomy.makers import makers_of
from triton_sp.anatomy.parts import FeatureMethod, Stack

IMAGE = 3  # the placeholder of the zoo's models
WIDTHS = [64, 32, 16, 32, 48]  # of the images of MiniCPM's batches, in patches


def step_with_strips(batch_name: str) -> tuple[list[int], str]:
    """How many patches this rank's tower got in each call, and what explain says of it."""
    case, patches = zoo.CASES["minicpmv4_6"], list[int]()
    with parity.in_dtype_of(case), parity.widened():
        model, wrapped, batch = case.model(), case.model(), case.batch(batch_name)
        expected = parity.exact_step(model, batch)
        triton_sp.wrap(wrapped, config=parity.heads(dist.get_world_size(), trial="off"))
        tower: Any = wrapped.get_submodule("model.vision_tower")
        tower.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[-1] // tiny.PATCH))
        parity.assert_close(parity.step(wrapped, batch), expected, 1e-10)
    (row,) = [row for row in triton_sp.explain(wrapped).rows if "vision" in row.part]
    return patches, row.decision


def test_each_rank_runs_its_own_part_of_a_strip(ranks) -> None:
    own = ranks.run(step_with_strips, "left_pad", ranks=3)
    assert own == [([96], "by images"), ([48], "by images"), ([48], "by images")], own
    assert sum(patches for (patches,), _ in own) == sum(WIDTHS)
    lone = ranks.run(step_with_strips, "plain", ranks=3)  # an image, which two ranks run to no effect
    assert lone == [([64], "by images")] * 3, lone


def step_by_images(name: str, checkpointing: str) -> list[float]:
    """As with older versions of transformers, where towers are not given what they know about patches: the worst error
    of a gradient in each batch."""
    case, errors = zoo.CASES[name], []
    with mock.patch("triton_sp.anatomy.fusion._takes_metadata", lambda tower: False), parity.in_dtype_of(case):
        for batch_name in ("left_pad", "image_and_video", "plain"):
            model, batch = case.model(), case.batch(batch_name)
            expected = parity.exact_step(model, batch)
            parity.set_checkpointing(model, checkpointing)
            triton_sp.wrap(model, config=parity.heads(dist.get_world_size()))
            (fusion,) = [row for row in triton_sp.explain(model).rows if row.kind.startswith("fusion")]
            assert fusion.decision == "features routed"
            model.zero_grad()
            loss = parity.loss_of(model(**batch), None)
            loss.backward()
            triton_sp.sync_gradients(model)
            errors.append(parity.gradient_error(parity.gradients(model), expected[1])[0])
    return errors


@pytest.mark.parametrize(("name", "checkpointing"), [("qwen2_5_vl", "non_reentrant"), ("qwen3_vl", "none")])
def test_blocks_with_other_segments_and_deepstack_on_own_images(ranks, name: str, checkpointing: str) -> None:
    """Qwen2.5-VL's blocks see windows or whole images, Qwen3-VL's levels are taken from between its blocks."""
    for size in (2, 3):
        for errors in ranks.run(step_by_images, name, checkpointing, ranks=size):
            assert max(errors) < 1e-6, errors


def pointing_batch() -> Batch:
    """Images of one crop and of two, whose cells point at patches of all crops of the batch."""
    whole = torch.tensor([0, 2, 4, 12, 14, 16, 24, 26, 28])[:, None] + torch.tensor([0, 1, 6, 7])
    crop = torch.cat([whole[:4], torch.tensor([[8, 9, -1, -1], [20, 21, -1, -1]])])  # at its edge, padded
    first = [0, 1, 3]  # the crop of each image
    pointers = [whole, torch.cat([whole + 36, crop + 72 * (crop >= 0)]), whole + 3 * 36]
    grids = torch.tensor([[3, 3, 0, 0], [3, 3, 2, 3], [3, 3, 0, 0]])
    batch = text_batch(torch.Generator().manual_seed(1), [[IMAGE] * len(own) for own in pointers])
    types = (batch["input_ids"] == IMAGE).long()
    given = {"image_token_pooling": torch.cat(pointers), "image_grids": grids, "mm_token_type_ids": types}
    return batch | given | {"pixel_values": noise(first[-1] + 1, 36, 48)}


def step_with_pointers() -> tuple[list[int], float]:
    """How many crops this rank's tower got, and the worst error of a gradient."""
    model = build("molmo2", "Molmo2ForConditionalGeneration", "vlm")
    wrapped, batch, crops = copy.deepcopy(model), pointing_batch(), list[int]()
    expected = parity.exact_step(model, batch)
    triton_sp.wrap(wrapped, config=parity.heads(dist.get_world_size()))
    tower: Any = wrapped.get_submodule("model.vision_tower.patch_embedding")
    tower.register_forward_pre_hook(lambda _, args: crops.append(len(args[0])))
    found = parity.step(wrapped, batch)
    fusion = next(row for row in triton_sp.explain(wrapped).rows if row.kind.startswith("fusion"))
    assert fusion.decision == "features routed" and "all made on every rank" not in fusion.last_batch, fusion
    return crops[-1:], parity.gradient_error(found[1], expected[1])[0]


def test_pointers_into_all_patches_become_those_of_own_crops(ranks) -> None:
    """In float64, but norms round to float32."""
    for size, sizes in ((2, [3, 1]), (3, [1, 2, 1])):
        found = ranks.run(step_with_pointers, ranks=size)
        assert [crops for crops, _ in found] == [[own] for own in sizes], found
        assert max(error for _, error in found) < 1e-6, found


class Composite(nn.Module):
    """Its parts are used in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.projector, self.shared, self.sounds, self.text = (nn.Linear(2, 2) for _ in range(5))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self._project(self.shared(self.tower(pixel_values)))

    def get_audio_features(self, sounds: Tensor) -> Tensor:
        return self.sounds(sounds)

    def _project(self, rows: Tensor) -> Tensor:
        return self.projector(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(self.shared(self.get_image_features(x)))


def test_parts_that_only_make_features_of_own_images() -> None:
    model = Composite()
    decoder = Stack("text", model.text, [], [], "", by_interface=True)
    images = FeatureMethod("get_image_features", "image_token_id", "images")
    whole = FeatureMethod("get_image_features", "image_token_id", "whole")
    assert makers_of(model, [images], decoder, "model") == ("model.tower", "model.projector")
    assert makers_of(model, [whole], decoder, "model") == ()


def test_what_makes_features_without_a_tower_is_named() -> None:
    rows = triton_sp.explain(build("fuyu", "FuyuForCausalLM", "vlm"), ranks=2).rows
    assert ("model.vision_embed_tokens", "by images") in [(row.part, row.decision) for row in rows]
