"""How a composite model makes features and puts them among its text, told by the conventions of transformers >= 5.

    get_image_features, get_video_features, get_audio_features   make the rows that stand for placeholders, in order
    config.image_token_id, ...                                   the ids of the placeholders
    get_placeholder_mask                                         finds them
    masked_scatter                                               puts the rows in their places, in order

A composite that keeps to all four is routed: its forward runs on this rank's tokens, and each rank is sent the rows
that its placeholders need. Which id that is, `get_placeholder_mask` is asked here; rows and placeholders are counted
when the rows have been made (wrappers/fusion/features.py). Of a composite that does not keep to them, features and
embeddings are whole on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_sp.anatomy.families import FEATURE_METHODS, PROVEN_COMPOSITES
from triton_sp.anatomy.makers import makers_of
from triton_sp.anatomy.parts import FeatureMethod, Fusion, Stack, code_names, contains, is_hf

MODALITIES = ("image", "video", "audio")

# What transformers >= 5.17 computes about patches outside of its towers and lets callers give.
VISION_METADATA = {
    "get_vision_attention_seqlens",
    "get_vision_interpolation_indices_and_weights",
    "get_vision_position_ids",
    "get_vision_window_index",
}


def find_fusion(decoder: Stack, towers: list[Stack], entry: nn.Module, names: dict[int, str]) -> Fusion | None:
    """The innermost model around towers and decoder, and whether it can be given this rank's part of its inputs. None
    where no tower is sharded, unless features are shared out by images."""
    composite = _around(decoder, towers, entry)
    if composite is None:
        return None
    kind = composite.config.model_type
    try:
        _expect_parts(composite, decoder, towers)
        features = _features(composite, towers)
    except _Unconventional as reason:
        return Fusion(names[id(composite)], composite, (), why=str(reason)) if towers else None
    name, gathered = names[id(composite)], _gathered(composite, {method.method for method in features})
    makers = makers_of(composite, features, decoder, name)
    return Fusion(name, composite, features, proven=kind in PROVEN_COMPOSITES, gathered=gathered, makers=makers)


def _around(decoder: Stack, towers: list[Stack], entry: nn.Module) -> Any:
    if not towers and "get_image_features" in code_names(type(decoder.module).forward):
        return decoder.module  # Chameleon's makes them itself
    parts = [decoder.module, *(tower.module for tower in towers)]
    around = [m for m in entry.modules() if is_hf(m) and all(contains(m, part) and m is not part for part in parts)]
    return around[-1] if around else None


def _expect_parts(composite: Any, decoder: Stack, towers: list[Stack]) -> None:
    if not all(tower.by_interface for tower in towers):
        raise _Unconventional("a tower has attention of its own")
    makes = [name for name in code_names(type(composite).forward) if name.startswith("create_") and "mask" in name]
    if decoder.gathered and makes:
        raise _Unconventional(f"it makes masks by {makes[0]}, and its decoder's layers get those of the whole batch")


def _gathered(composite: Any, routed: set[str]) -> tuple[str, ...]:
    """The arguments of features that are not routed, such as a video that stands between two marks of its own."""
    others = [f"get_{kind}_features" for kind in MODALITIES if f"get_{kind}_features" not in routed]
    uses = code_names(type(composite).forward)
    methods = [inspect.unwrap(getattr(type(composite), name)) for name in others if name in uses]
    return tuple(list(inspect.signature(method).parameters)[1] for method in methods)


class _Unconventional(Exception):
    """A composite does not keep to the conventions; says in which way."""


def _features(composite: Any, towers: list[Stack]) -> tuple[FeatureMethod, ...]:
    """How each kind of features is made."""
    known = FEATURE_METHODS.get(composite.config.model_type, ())
    if known and all(hasattr(composite, features.method) for features in known):
        return known
    uses = code_names(type(composite).forward)
    modalities = [kind for kind in MODALITIES if f"get_{kind}_features" in uses]
    if not modalities or not {"get_placeholder_mask", "masked_scatter"} <= uses:
        raise _Unconventional("its forward does not put features in by get_placeholder_mask and masked_scatter")
    if "image_newline" in uses:
        raise _Unconventional("this version of transformers adds rows to features after they are made")
    if hasattr(composite, "get_rope_index") and not hasattr(composite, "compute_3d_position_ids"):
        raise _Unconventional("its positions are not made by compute_3d_position_ids")
    tokens = _placeholders(composite, modalities)
    methods = [_method(composite, kind, token, towers) for kind, token in tokens.items()]
    if any(isinstance(module, _BatchNorm) for module in composite.modules()):  # Emu 3: its statistics are all images'
        methods = [replace(method, granularity="whole") for method in methods]
    return tuple(methods)


def _method(composite: Any, kind: str, token: str, towers: list[Stack]) -> FeatureMethod:
    """How features of one kind are made, by the signature of the method that makes them."""
    name = f"get_{kind}_features"
    function = inspect.unwrap(getattr(type(composite), name))
    parameters = list(inspect.signature(function).parameters)[1:]
    if kind == "audio":
        return FeatureMethod(name, token, "whole")
    grid = next((grid for grid in (f"{kind}_grid_thw", f"{kind}_grid_hw") if grid in parameters), None)
    if grid is not None:
        cut_anywhere = grid.endswith("thw") and len(towers) == 1 and _takes_metadata(towers[0].module)
        return FeatureMethod(name, token, "patches" if cut_anywhere else "images", grid)
    if parameters[0] == "pixel_values_videos" and "image_newline" in code_names(function):
        return FeatureMethod(name, token, "frames")
    return FeatureMethod(name, token, "images", per_sample="pixel_attention_mask" in parameters)


def _takes_metadata(tower: nn.Module) -> bool:
    """Whether a tower takes what it knows about its patches as arguments."""
    uses = {name for name in code_names(type(tower).forward) if name.startswith("get_vision_")}
    needed = {"spatial_merge_size", "patch_embed"}
    if "get_vision_interpolation_indices_and_weights" in uses:
        needed |= {"num_grid_per_side", "interpolation_mode", "interpolation_align_corners"}
    if "get_vision_window_index" in uses:
        needed |= {"window_size", "patch_size", "fullatt_block_indexes"}
    knows = all(hasattr(tower, name) for name in needed)
    return knows and "get_vision_position_ids" in uses and uses <= VISION_METADATA


# --- placeholders --------------------------------------------------------------------------------------------------


def _placeholders(composite: Any, kinds: Iterable[str]) -> dict[str, str]:
    """The attribute of the configuration that holds the placeholder's id of each kind of features, as
    `get_placeholder_mask` finds it (GLM-4V's videos stand where images do)."""
    ids = {f"{kind}_token_id": getattr(composite.config, f"{kind}_token_id", None) for kind in MODALITIES}
    ids = {value: name for name, value in reversed(ids.items()) if isinstance(value, int)}  # the first of equal ones
    ids = {name: value for value, name in ids.items()}
    if not ids:
        raise _Unconventional("its configuration has no placeholder ids")
    placeholders = {}
    for kind in kinds:
        found = _find_placeholder(composite, kind, ids)
        if found is not None:
            placeholders[kind] = found
        elif kind == "image":
            raise _Unconventional(f"its get_placeholder_mask does not find the placeholders of {kind} features")
    return placeholders


def _find_placeholder(composite: Any, kind: str, ids: dict[str, int]) -> str | None:
    """Ask `get_placeholder_mask` which of these ids, one token each, stands for features of a kind. None if not one."""
    tokens = torch.tensor([list(ids.values())])
    for shape in ((1, 2), (1, 1, 2)):  # rows, or a tensor of images and their rows
        try:
            marked = _mask_of(composite, kind, tokens, torch.zeros(shape), ids)
        except Exception:  # a method of anybody's: whatever it raises, it is not the convention
            continue
        found = (marked[..., 0] if marked.ndim == 3 else marked)[0].nonzero().flatten().tolist()
        return list(ids)[found[0]] if len(found) == 1 else None
    return None


def _mask_of(composite: Any, kind: str, tokens: Tensor, features: Tensor, ids: dict[str, int]) -> Tensor:
    """(1, tokens) or (1, tokens, ...), which of these `get_placeholder_mask` takes for placeholders of a kind."""
    method = getattr(composite, f"get_{kind}_placeholder_mask", composite.get_placeholder_mask)
    names = [name for name in inspect.signature(method).parameters if name.endswith("features")]
    given: dict[str, Any] = {"input_ids": tokens, "inputs_embeds": torch.zeros(*tokens.shape, 2)}
    if names == ["features"]:
        given |= {"features": features, "token_id": ids[f"{kind}_token_id"]}
    elif f"{kind}_features" in names:
        given[f"{kind}_features"] = features
    masks = method(**given)
    if not isinstance(masks, tuple):
        return masks
    return masks[MODALITIES.index(kind) if len(masks) == len(MODALITIES) else names.index(f"{kind}_features")]
