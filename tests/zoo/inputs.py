"""Batches for any model: text of several rows, and images as the model's own methods take them.

Nothing is known of a family here. What pixels look like is tried: of a few common layouts, the first that the model's
own get_image_features takes. How many placeholders they need is told by how many rows come back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from zoo.batches import Batch, noise, text_batch
from zoo.hand_made import BATCHES
from zoo.shrink import PATCH, SIDE

# --- images --------------------------------------------------------------------------------------------------------


def _layouts(model: Any, names: list[str], images: int) -> Iterator[Batch]:
    """What pixels of some images may look like."""
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", SIDE)
    side = side if isinstance(side, int) else SIDE
    grid = next((name for name in names if name in ("image_grid_thw", "image_grid_hw")), None)
    if grid is not None:
        shapes = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 4, 4]])[:images]
        patches = int(shapes.prod(-1).sum())
        given = {grid: shapes if grid.endswith("thw") else shapes[:, 1:]}
        if "image_merge_sizes" in names:
            given["image_merge_sizes"] = torch.full((images,), 2)
        for patch in (PATCH, getattr(vision, "patch_size", PATCH)):
            for frames in (1, getattr(vision, "temporal_patch_size", 1) or 1, getattr(vision, "patch_temporal", 1)):
                yield {"pixel_values": noise(patches, 3 * frames * patch**2), **given}
                yield {"pixel_values": noise(patches, 3, patch, patch), **given}
                yield {"pixel_values": noise(patches, 3, frames, patch, patch), **given}
    sizes = torch.full((images, 2), side)
    if "spatial_shapes" in names:
        mask = torch.ones(images, 36, dtype=torch.long)
        shapes = torch.full((images, 2), 6)
        yield {"pixel_values": noise(images, 36, 3 * PATCH**2), "spatial_shapes": shapes, "pixel_attention_mask": mask}
    if "pixel_attention_mask" in names:
        mask = torch.ones(images, 1, side, side, dtype=torch.long)
        yield {"pixel_values": noise(images, 1, 3, side, side), "pixel_attention_mask": mask}
    if "target_sizes" in names:
        shapes = torch.tensor([[8, 8]] * images)
        yield {"pixel_values": noise(1, 3, PATCH, 64 * PATCH * images), "target_sizes": shapes}
    if "image_position_ids" in names:
        places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).flatten(0, 1)
        yield {"pixel_values": noise(images, 36, 3 * PATCH**2), "image_position_ids": places.expand(images, -1, -1)}
    if "high_res_pixel_values" in names:
        yield {"pixel_values": noise(images, 3, side, side), "high_res_pixel_values": noise(images, 3, 64, 64)}
    if "image_sizes" in names:
        yield {"pixel_values": noise(images, 2, 3, side, side), "image_sizes": sizes}
        yield {"pixel_values": noise(images, 3, side, side), "image_sizes": sizes}
    if "num_local_patches" in names:
        local = {"pixel_values_local": noise(2 * images, 3, side, side)}
        yield {"pixel_values": noise(images, 3, side, side), "num_local_patches": torch.full((images,), 2), **local}
    yield {"pixel_values": noise(images, 3, side, side)}
    yield {"pixel_values": noise(images, 2, 3, side, side)}


def _owner(model: nn.Module) -> Any:
    """The innermost module that makes features of images, or None."""
    makers = [module for module in model.modules() if hasattr(module, "get_image_features")]
    return makers[-1] if makers else None


def _rows(out: Any) -> list[int]:
    """How many features there are of each image."""
    held = getattr(out, "pooler_output", out)
    if held is None:
        held = out.last_hidden_state
    if held is None:
        held = out.deepstack_features[0][1]
    if isinstance(held, Tensor):
        return [held.shape[:-1].numel()] if held.ndim < 3 else [part.shape[:-1].numel() for part in held]
    return [part.shape[:-1].numel() for part in held]


def image_batches(model: nn.Module) -> Iterator[Batch]:
    """Batches with an image in each row but the last, whose shapes the model's own methods take."""
    config: Any = model.config
    if config.model_type in BATCHES:
        yield BATCHES[config.model_type](model)
        return
    owner = _owner(model)
    if owner is None and "pixel_values" not in inspect.signature(type(model).forward).parameters:
        yield text_batch(torch.Generator().manual_seed(1))  # of a text model that is listed among them
        return
    names = [] if owner is None else list(inspect.signature(owner.get_image_features).parameters)
    ids = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    token = next((value for value in ids if isinstance(value, int)), 3)
    images = 3
    for visual in _layouts(model, names, images):
        try:
            with torch.no_grad():
                rows = _rows(owner.get_image_features(**visual)) if owner is not None else [1] * images
        except Exception:  # another layout
            continue
        if len(rows) != images:
            if sum(rows) % images:
                continue
            rows = [sum(rows) // images] * images
        batch = text_batch(torch.Generator().manual_seed(1), [[token] * count for count in rows])
        yield batch | _per_token(model, batch["input_ids"], token) | visual


def _per_token(model: nn.Module, ids: Tensor, token: int) -> Batch:
    """What a model's forward wants to know of each token."""
    wanted = inspect.signature(type(model).forward).parameters
    return {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids") if name in wanted}


def pixel_batch(model: nn.Module) -> Batch:
    """Images for a vision model alone."""
    for visual in _layouts(model, list(inspect.signature(type(model).forward).parameters), 5):
        try:
            with torch.no_grad():
                model(**visual)
        except Exception:  # another layout
            continue
        return visual
    raise ValueError("no layout of pixels that is known here fits")
