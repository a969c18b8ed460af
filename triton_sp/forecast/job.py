"""A step of training to be planned: its engine, and a batch like those of the model's processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError, require

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Job:
    """One step of training.

    Attributes:
        gpus: of the whole job, over which ZeRO and FSDP shard.
        text: tokens of text in the row.
        images: how many, each of `height` x `width` pixels. Towers of one size get images, or tiles, of that size.
        engine: one of ENGINES.
        checkpointing: whether layers are recomputed in the backward.
        chunked_loss: whether the loss is computed without all logits.
        tiled_mlp: tokens that MLPs work on at a time, see SPConfig.
        offload: whether what layers keep for the backward goes to CPU memory, see SPConfig.
    """

    gpus: int
    text: int = 0
    images: int = 0
    height: int = 0
    width: int = 0
    engine: str = "ddp"
    checkpointing: bool = False
    chunked_loss: bool = False
    tiled_mlp: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        """Raise an InputError for an engine that is none of the known ones."""
        require(self.engine in ENGINES, InputError, "engine", f"one of {ENGINES}", self.engine, "give one of them")


def load_model(source: str | Path) -> nn.Module:
    """A model without weights, of the configuration in a folder or file (or on the Hub, where there is a network).

    Raises:
        InputError: it is the configuration of no model that generates text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config, dtype=torch.bfloat16)
    raise InputError(
        "configuration",
        expected="that of a language model, or of a vision and language model",
        found=type(config).__name__,
        remedy="give the folder of the whole model",
    )


def make_batch(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """One row as the model's processor would make it: the images, each behind a token of text, then the text.

    Raises:
        InputError: images for a model whose processor takes others than grids of patches, or images of one size.
    """
    ids = torch.full((1, job.text), 5)
    if not job.images:
        return {"input_ids": ids, "labels": ids}
    config: Any = getattr(model, "config", None)
    vision: Any = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if vision is None or token is None:
        raise _unknown(model)
    pixels, rows = _patches(vision, job) if hasattr(vision, "spatial_merge_size") else _tiles(model, vision, job)
    image = torch.full((1, rows), token)
    ids = torch.cat([*([ids[:, :1], image] * job.images), ids], 1)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == token, -100), **pixels}
    if "image_grid_thw" in pixels:
        batch["mm_token_type_ids"] = (ids == token).int()
    elif config.model_type.startswith("gemma3"):
        batch["token_type_ids"] = (ids == token).int()
    return batch


def _patches(vision: Any, job: Job) -> tuple[dict[str, Tensor], int]:
    """Qwen-VL, GLM-4V: packed patches with a grid for each image, and placeholders of an image."""
    patch, frames, merge = vision.patch_size, getattr(vision, "temporal_patch_size", 1), vision.spatial_merge_size
    height, width = (max(round(side / patch / merge), 1) * merge for side in (job.height, job.width))
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    shape = job.images * height * width, channels * frames * patch**2
    grids = torch.tensor([[1, height, width]] * job.images)
    pixels = torch.zeros(shape, dtype=torch.bfloat16)
    return {"pixel_values": pixels, "image_grid_thw": grids}, height * width // merge**2


_ONE_SIZE = ("llava", "internvl", "gemma3")


def _tiles(model: nn.Module, vision: Any, job: Job) -> tuple[dict[str, Tensor], int]:
    """LLaVA, InternVL, Gemma 3: images, or tiles, of the size that the tower is made for. How many placeholders one
    has, the model's own method says."""
    composite: Any = model
    if composite.config.model_type not in _ONE_SIZE or not hasattr(composite, "get_image_features"):
        raise _unknown(model)
    side = vision.image_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    kind = next(model.parameters()).dtype
    with torch.no_grad():
        made = composite.get_image_features(pixel_values=torch.zeros(1, 3, height, width, dtype=kind))
    rows = getattr(made, "pooler_output", made)
    rows = rows if isinstance(rows, Tensor) else rows[0]
    return {"pixel_values": torch.zeros(job.images, 3, height, width, dtype=kind)}, rows.shape[:-1].numel()


def _unknown(model: nn.Module) -> InputError:
    return InputError(
        "images",
        expected="a model that takes patches of images of any size (Qwen-VL, GLM-4V), or images of one size "
        f"({', '.join(_ONE_SIZE)})",
        found=type(model).__name__,
        remedy="plan a batch of its processor: triton_sp.explain(model, ranks=..., **batch)",
    )
