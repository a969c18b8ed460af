"""How features are made, as the conventions tell it, against the table in which each family had its row before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from kit import zoo
from torch import Tensor, nn
from zoo.build import build

import triton_sp
from triton_sp.anatomy.find import find_parts
from triton_sp.anatomy.parts import FeatureMethod, Fusion

_IMAGES = FeatureMethod("get_image_features", "image_token_id", "images")
_SAMPLES = FeatureMethod("get_image_features", "image_token_id", "images", per_sample=True)
_FRAMES = FeatureMethod("get_video_features", "video_token_id", "frames")
_GRIDS = (
    FeatureMethod("get_image_features", "image_token_id", "patches", "image_grid_thw"),
    FeatureMethod("get_video_features", "video_token_id", "patches", "video_grid_thw"),
)
_FRAME_GRIDS = (  # frames of videos stand where images do
    _GRIDS[0],
    FeatureMethod("get_video_features", "image_token_id", "patches", "video_grid_thw"),
)
# The table that the conventions replaced; it goes with the next release.
ORACLE = {
    "gemma3": (_IMAGES,),
    "glm4v": _FRAME_GRIDS,
    "idefics2": (_SAMPLES,),
    "idefics3": (_SAMPLES,),
    "internvl": (_IMAGES,),
    "llava": (_IMAGES,),
    "llava_next": (_IMAGES,),
    "llava_onevision": (_IMAGES, _FRAMES),
    "mistral3": (_IMAGES,),
    "paligemma": (_IMAGES,),
    "qwen2_5_vl": _GRIDS,
    "qwen2_vl": _GRIDS,
    "qwen3_5": _GRIDS,
    "qwen3_5_moe": _GRIDS,
    "qwen3_vl": _GRIDS,
    "qwen3_vl_moe": _GRIDS,
    "smolvlm": (_SAMPLES,),
}
LATER = {"minicpmv4_6", "lfm2_vl", *(case.name for case in zoo.special.cases())}  # never had a row
TOWERLESS = {"fuyu": "FuyuForCausalLM", "gemma4_unified": "Gemma4UnifiedForConditionalGeneration"}
CASES = {name: case for name, case in zoo.CASES.items() if case.kind == "vlm" and name not in LATER}


def fusion_of(model: nn.Module) -> Fusion:
    fusion = find_parts(model).fusion
    assert fusion is not None
    return fusion


@pytest.mark.parametrize("name", CASES)
def test_conventions_tell_what_the_table_did(name: str) -> None:
    if name in zoo.FEATURES_GATHERED:
        pytest.skip("this version of transformers makes its features otherwise")
    fusion = fusion_of(CASES[name].model())
    module: Any = fusion.module
    assert fusion.features == ORACLE[module.config.model_type]
    assert fusion.proven and not fusion.why


def test_the_oracle_has_no_row_too_many() -> None:
    kinds = {fusion_of(case.model()).module.config.model_type for case in CASES.values()}  # type: ignore[union-attr]
    assert kinds == set(ORACLE)


class Uncounted(hf.LlavaModel):
    """Its placeholders are found, and not counted."""

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)


class Unmarked(hf.LlavaModel):
    """Its placeholders are not found by their ids."""

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        return torch.zeros_like(inputs_embeds, dtype=torch.bool)


class Scattered(hf.LlavaModel):
    """Puts features in by code of its own."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.get_image_features(pixel_values).pooler_output


@pytest.mark.parametrize(
    ("kind", "why"), [(Unmarked, "does not find the placeholders of image"), (Scattered, "does not put features in by")]
)
def test_what_does_not_keep_to_them_is_gathered(kind: type, why: str) -> None:
    """And explain says why."""
    model = zoo.CASES["llava"].model()
    model.model.__class__ = kind
    (row,) = [row for row in triton_sp.explain(model, ranks=2).rows if row.kind.startswith("fusion")]
    assert row.decision == "features gathered" and why in row.why


def test_rows_need_not_be_counted_by_the_model() -> None:
    """They are when they have been made, see features.check_count."""
    model = zoo.CASES["llava"].model()
    model.model.__class__ = Uncounted
    assert fusion_of(model).features == (_IMAGES,)


@pytest.mark.parametrize(("model_type", "name"), TOWERLESS.items())
def test_features_without_a_tower_that_is_sharded(model_type: str, name: str) -> None:
    """There is none, or one that stays whole: each rank makes those of its images."""
    model = build(model_type, name, "vlm")
    assert not find_parts(model).towers and fusion_of(model).features[0] == _IMAGES


def test_of_no_known_family_is_accepted_by_structure() -> None:
    model = zoo.CASES["llava"].model()
    model.model.config.model_type = "mine"
    (row,) = [row for row in triton_sp.explain(model, ranks=2).rows if row.kind.startswith("fusion")]
    assert (row.decision, row.why) == ("features routed", "accepted by structure")
