"""What the values of a call must be, beyond the shapes of its fields: what one process would refuse is refused here, on
every rank and before anything is sent.

On a rank the model's own code sees a part of the batch only. A label that no word has would be met by one rank of the
group, in the middle of its step, and pixels behind those that the grids count by none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import Anatomy, Fusion, is_hf
from triton_sp.errors import InputError, require, shown
from triton_sp.loss import IGNORE
from triton_sp.wrappers.cuts import PixelShard

# What transformers' models hand on to their layers without naming it, and what is handled before the model runs.
_HANDED_ON = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal", "position_ids",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "use_cache", "cache_position", "labels", "shift_labels", "logits_to_keep", "fused_lm_head", "token_type_ids",
}  # fmt: skip


def check_names(anatomy: Anatomy, arguments: Mapping[str, Any]) -> None:
    """Raise an InputError for an argument that no part of the model takes: `**kwargs` would swallow it."""
    entry: Any = anatomy.entry
    unknown = set(arguments) - _named(type(entry).forward) - _HANDED_ON
    if not unknown or not is_hf(entry):
        return
    models = [type(module).forward for module in entry.modules() if is_hf(module)]
    unknown -= set().union(*map(_named, models), anatomy.fusion.visual_arguments if anatomy.fusion else ())
    if unknown:
        name = min(unknown)
        raise InputError(
            name,
            expected=f"arguments that {type(entry).__name__} or a model inside of it names",
            found=f"{name}, which none of them reads",
            remedy="leave it out, or correct its name",
        )


@cache
def _named(method: Any) -> frozenset[str]:
    """The parameters of a method that it has by name, also behind decorators."""
    parameters = inspect.signature(method).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def check_devices(arguments: Mapping[str, Any], device: torch.device) -> None:
    """Raise an InputError for a tensor without values, or on another device than the batch. Labels and tensors of a few
    numbers (grids, counts) may be on the CPU, as models have it."""
    for name, value in arguments.items():
        value = value.rows if isinstance(value, PixelShard) else value
        if not isinstance(value, Tensor) or (value.device == device and device.type != "meta"):
            continue
        small = name == "labels" or value.ndim <= 1 or value.shape[-1] <= 3
        if value.device.type == "meta" or not (small and value.device.type == "cpu"):
            raise InputError(
                name,
                expected="a tensor with values" if value.is_meta else f"a tensor on {device}, as the batch is",
                found=f"one on {value.device}",
                remedy="move the whole batch to the device of the model",
            )


def check_ids(ids: Tensor, fusion: Fusion | None, embedding: nn.Module | None) -> None:
    """Raise an InputError for ids without an embedding; those of placeholders need none."""
    words = getattr(embedding, "num_embeddings", None)
    if not isinstance(words, int) or ids.ndim != 2:
        return
    wrong = (ids < 0) | (ids >= words)
    if fusion is not None:
        config: Any = fusion.module.config
        for features in fusion.features:
            if not 0 <= getattr(config, features.token) < words:
                wrong &= ids != getattr(config, features.token)
    _refuse_places("input_ids", ids, wrong, f"0 to {words - 1}", "use the tokenizer of the model")


def check_labels(labels: Tensor, head: nn.Module | None) -> None:
    """Raise an InputError for labels that cross entropy does not take: of another dtype than int64, or of no word."""
    require(labels.dtype == torch.int64, InputError, "labels", "int64", str(labels.dtype)[6:], "labels = labels.long()")
    words = getattr(head, "out_features", None)
    wrong = (labels < 0) & (labels != IGNORE)
    if isinstance(words, int):
        wrong |= labels >= words
    wrong[:, :1] = False  # predicted by nothing, and not looked at by models
    _refuse_places(
        "labels", labels, wrong, f"0 to {words - 1 if isinstance(words, int) else 'the last word'}, or {IGNORE}",
        f"set what is not to be learnt to {IGNORE}",
    )  # fmt: skip


def _refuse_places(name: str, values: Tensor, wrong: Tensor, expected: str, remedy: str) -> None:
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            name, expected=expected, found=f"{int(values[row, column])} in row {row} at column {column}", remedy=remedy
        )


def check_items(items: Any, labelled: bool) -> None:
    """Raise an InputError unless the divisor of the loss is a positive number, or 0 for a batch without labels."""
    if items is None:
        return
    plain = isinstance(items, int | float) and not isinstance(items, bool)
    if isinstance(items, Tensor):
        plain = items.numel() == 1 and items.dtype not in (torch.bool, torch.complex64, torch.complex128)
    number = float(items) if plain else math.nan
    require(
        math.isfinite(number) and (number > 0 or (number == 0 and not labelled)),
        InputError,
        "num_items_in_batch",
        "a positive number, by which the summed loss is divided",
        number if plain else f"a {type(items).__name__} {getattr(items, 'shape', '')}",
        "pass the number of labels of all batches of the step, or leave it out",
    )


def check_pixels(fusion: Fusion, arguments: Mapping[str, Any], unit: int) -> None:
    """Raise an InputError for pixels that don't fit their grids, or don't have the per-image arguments beside them."""
    merge = round(unit**0.5)
    takes = [_parameters(getattr(type(fusion.module), features.method)) for features in fusion.features]
    for features, own in zip(fusion.features, takes, strict=True):
        name = own[0]
        pixels = arguments.get(name)
        if features.granularity == "patches" and features.grid is not None:
            _check_grid(features.grid, arguments, name, merge)
        elif isinstance(pixels, Tensor | PixelShard) and features.grid is None:
            others = set().union(*takes).difference(own)  # an image has no part in the arguments of videos
            _check_images({key: value for key, value in arguments.items() if key not in others}, name)
        if isinstance(pixels, Tensor) and (not pixels.is_floating_point() or pixels.numel() == 0):
            raise InputError(
                name,
                expected="floating pixels of an image or more",
                found=shown(pixels),
                remedy="leave it out of a batch without images",
            )


@cache
def _parameters(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


def _check_images(arguments: Mapping[str, Any], pixels: str) -> None:
    """As many entries of each per-image argument as there are images."""
    images = len(arguments[pixels])
    for name in ("image_sizes", "pixel_attention_mask"):
        value = arguments.get(name)
        if value is not None and arguments.get("batch_num_images") is None and len(value) != images:
            raise InputError(
                name,
                expected=f"{images} entries, as {pixels} has images",
                found=f"{len(value)}",
                remedy="make both by the model's own processor",
            )


def _check_grid(name: str, arguments: Mapping[str, Any], pixels: str, merge: int) -> None:
    grid, rows, remedy = arguments.get(name), arguments.get(pixels), "make both by the model's own processor"
    if grid is None and rows is not None:
        raise InputError(name, expected=f"it beside {pixels}", found="none", remedy=remedy)
    if grid is None:
        return
    fits = isinstance(grid, Tensor) and grid.ndim == 2 and grid.shape[1] == 3 and not grid.is_floating_point()
    found = shown(grid) if isinstance(grid, Tensor) else type(grid).__name__
    require(fits, InputError, name, "integers (images, 3): frames, height and width", found, remedy)
    sizes = grid.tolist()
    for index, (frames, height, width) in enumerate(sizes):
        require(
            min(frames, height, width) > 0 and height % merge == 0 and width % merge == 0,
            InputError,
            name,
            f"positive frames, height and width, the last two multiples of {merge}",
            f"{[frames, height, width]} of image {index}",
            remedy,
        )
    patches = sum(math.prod(size) for size in sizes)
    require(
        rows is None or len(rows) == patches,  # without pixels a grid still says what positions are
        InputError,
        pixels,
        f"{patches} rows of patches, as {name} counts",
        "fewer or more" if rows is None else f"{len(rows)}",
        remedy,
    )
