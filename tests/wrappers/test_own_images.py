"""Towers that are not sharded run on a rank's own images where features are routed: also where the patches of all
images lie in one strip. `explain` says so, and of nothing that another method or the forward calls as well."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import Tensor, nn
from zoo.build import build

import triton_sp
from triton_sp.anatomy.makers import makers_of
from triton_sp.anatomy.parts import FeatureMethod, Stack

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
