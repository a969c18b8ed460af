"""Batches of models whose images are not given as others' are, by model_type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo.batches import Batch, noise, text_batch
from zoo.shrink import FIRST_TEXT, PATCH, SIDE

IMAGE, ROWS = 3, 4  # the placeholder's id; rows of a batch
_CELLS = SIDE // PATCH


def _with_runs(count: int, images: int = ROWS) -> Batch:
    """Rows of text, the first `images` of them with as many placeholders."""
    return text_batch(torch.Generator().manual_seed(1), [[IMAGE] * count] * images)


def _pictures(images: int = ROWS, *more: int) -> Tensor:
    return noise(images, *more, 3, SIDE, SIDE)


def _queries(model: Any) -> Batch:
    """BLIP-2: as many placeholders as the Q-Former has queries, an image in every row."""
    return _with_runs(model.config.num_query_tokens) | {"pixel_values": _pictures()}


def _instructed(model: Any) -> Batch:
    """And an instruction that the Q-Former reads."""
    ids = torch.randint(FIRST_TEXT, 100, (ROWS, 5), generator=torch.Generator().manual_seed(2))
    return _queries(model) | {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _instructed_video(model: Any) -> Batch:
    frames = 2
    batch = _with_runs(model.config.num_query_tokens * frames)
    batch["input_ids"][batch["input_ids"] == IMAGE] = model.config.video_token_id
    given = _instructed(model)
    qformer = {name: given[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    return batch | qformer | {"pixel_values": _pictures(ROWS, frames)}


def _whole_images(model: Any) -> Batch:
    """Images that the model itself puts before or beside the text."""
    return _with_runs(0, 0) | {"pixel_values": _pictures()}


def _idefics(model: Any) -> Batch:
    batch = _with_runs(0, 0)
    seen = torch.ones(*batch["input_ids"].shape, 1, dtype=torch.long)
    return batch | {"pixel_values": _pictures(ROWS, 1), "image_attention_mask": seen}


def _kosmos(model: Any) -> Batch:
    batch = _with_runs(model.config.latent_query_num)
    return batch | {"pixel_values": _pictures(), "image_embeds_position_mask": (batch["input_ids"] == IMAGE).long()}


def _kosmos_patches(model: Any) -> Batch:
    """Patches with their row and column in front."""
    given = _kosmos(model)
    places = torch.cartesian_prod(torch.arange(1, _CELLS + 1), torch.arange(1, _CELLS + 1)).double()
    patches = noise(ROWS, _CELLS**2, 3 * PATCH**2)
    del given["pixel_values"]
    return given | {"flattened_patches": torch.cat([places.expand(ROWS, -1, -1), patches], -1)}


def _patches(features: int, *shape: int) -> Callable[[nn.Module], Batch]:
    """Images as so many patches of a shape."""
    return lambda model: _with_runs(features, 3) | {"pixel_values": noise(3, *shape)}


def _high_and_low(model: Any) -> Batch:
    """Each image in two resolutions."""
    high = noise(3, 3, *[model.config.high_res_vision_config.image_size] * 2)
    return _with_runs(_CELLS**2, 3) | {"pixel_values": _pictures(3), "high_res_pixel_values": high}


def _prefixed(model: Any) -> Batch:
    """An image and the text before it are a prefix, whose tokens see one another."""
    batch = _with_runs(_CELLS**2, 3)
    ends = batch["attention_mask"].cumsum(1) - (batch["input_ids"] == IMAGE).sum(1, keepdim=True)
    return batch | {"pixel_values": _pictures(3), "token_type_ids": (ends > 2).long()}


def _tiles(model: Any) -> Batch:
    """Some tiles of each sample, filled up with empty ones."""
    there = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    runs = [[IMAGE] * int(model.model.image_seq_len * count) for count in there.sum(1)]
    batch = text_batch(torch.Generator().manual_seed(1), runs)
    return batch | {"pixel_values": _pictures(ROWS, 2), "pixel_attention_mask": there}


def _places(model: Any) -> Batch:
    """Patches with the place of each, pooled already."""
    places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="xy"), -1).flatten(0, 1)
    side = model.config.vision_config.model_patch_size
    batch = _with_runs(len(places), 3)
    types = (batch["input_ids"] == IMAGE).long()
    given = {"image_position_ids": places.expand(3, -1, -1), "mm_token_type_ids": types}
    return batch | given | {"pixel_values": noise(3, len(places), 3 * side**2)}


def _merged(model: Any) -> Batch:
    """Packed patches, one for each placeholder."""
    shapes = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 2]])
    side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    batch = text_batch(torch.Generator().manual_seed(1), [[IMAGE] * int(count) for count in shapes.prod(-1)])
    return batch | {"pixel_values": noise(20, side, side, 3), "image_grid_thw": shapes}


def _folded(model: Any) -> Batch:
    """Patches of some frames, one for each placeholder."""
    vision = model.config.vision_config
    side, count = vision.patch_size, 5
    batch = _with_runs(count, 3)
    return batch | {"pixel_values": noise(3 * count, vision.temporal_patch_size, side, side, vision.num_channels)}


def _mllama(model: Any) -> Batch:
    """Images of one and of two tiles, which a row sees from its third token on."""
    batch = _with_runs(1)
    tiles = 1 + torch.arange(ROWS)[:, None] % 2
    there = torch.arange(2) < tiles[..., None]
    after = (batch["input_ids"] == IMAGE).cumsum(1) > 0
    return batch | {
        "pixel_values": _pictures(ROWS, 1, 2),
        "aspect_ratio_ids": tiles,
        "aspect_ratio_mask": there.long(),
        "cross_attention_mask": (after[..., None, None] & there[:, None]).long(),
    }


def _molmo2(model: Any) -> Batch:
    """Pictures of one crop, whose patches are pooled by fours."""
    images = 3
    corners = (torch.arange(0, _CELLS, 2)[:, None] * _CELLS + torch.arange(0, _CELLS, 2)).flatten()
    pooling = corners[:, None] + torch.tensor([0, 1, _CELLS, _CELLS + 1])
    first = torch.arange(images)[:, None, None] * _CELLS**2
    batch = _with_runs(len(corners), images)
    return batch | {
        "pixel_values": noise(images, _CELLS**2, 3 * PATCH**2),
        "image_token_pooling": (first + pooling).flatten(0, 1),
        "image_grids": torch.tensor([[_CELLS // 2, _CELLS // 2, 0, 0]] * images),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


BATCHES: dict[str, Callable[[nn.Module], Batch]] = {
    "blip": _whole_images,
    "blip-2": _queries,
    "deepseek_vl_hybrid": _high_and_low,
    "fuyu": _patches(_CELLS**2, _CELLS**2, 3 * PATCH**2),
    "gemma4_unified": _places,
    "git": _whole_images,
    "granite_docling": _tiles,
    "idefics": _idefics,
    "inkling2": _merged,
    "inkling2_loop": _merged,
    "inkling_mm_model": _folded,
    "instructblip": _instructed,
    "instructblipvideo": _instructed_video,
    "kosmos-2": _kosmos,
    "kosmos-2.5": _kosmos_patches,
    "mllama": _mllama,
    "molmo2": _molmo2,
    "paligemma": _prefixed,
}
