"""fuse: between tower and decoder. Each rank embeds its part of the text, makes the features of its part of the pixels,
and gets exactly the rows that its placeholders need; the model's own forward puts them in their places.

Which rows these are every rank can tell for all: placeholders and features are in the same order, so the rows that a
rank needs are a range of them, and an all-to-all brings it from those who have made them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.families import first_position
from triton_sp.anatomy.parts import FeatureMethod, Fusion
from triton_sp.errors import InputError
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.decoder import TextCall, localise_text
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.patches import Patches, cut_patches, merged_rows
from triton_sp.wrappers.scope import Call, FeatureCall, active, current, refuse_lost_scope
from triton_sp.wrappers.tower import TowerPass


def install(fusion: Fusion, installation: Installation) -> None:
    """Override the forward of the composite and the methods that make its features."""
    installation.override(fusion.module, _run_composite)
    for features in fusion.features:
        installation.override(fusion.module, partial(_run_features, features), features.method)


# --- what is needed ------------------------------------------------------------------------------------------------


def needed_rows(fusion: Fusion, tokens: Tensor, index: Tensor, shards: Shards) -> dict[str, Shards]:
    """How many features each rank's placeholders need, by the method that makes them.

    Args:
        tokens: (B, S) ids, or (B, S, C) embeddings: those of placeholders are known then.
        index: (S',) where each token of the stream stands in the flattened batch.
        shards: how the stream is cut.
    """
    needed = {}
    for features in fusion.features:
        marked = _placeholders(fusion, features, tokens).flatten()[index].cpu()
        counts = [int(part.sum()) for part in marked.split(list(shards.sizes))]
        needed[features.method] = Shards(tuple(counts))
    return needed


def _placeholders(fusion: Fusion, features: FeatureMethod, tokens: Tensor) -> Tensor:
    module: Any = fusion.module
    token = getattr(module.config, features.token)
    if tokens.ndim == 2:
        return tokens == token
    embedding = module.get_input_embeddings()(torch.tensor(token, device=tokens.device))
    return (tokens == embedding).all(-1)


def check_rows(installation: Installation, arguments: Mapping[str, Any], needed: dict[str, Shards]) -> None:
    """FeatureMethod that are counted by their grids must be as many as the placeholders; others are when they are made.

    Raises:
        InputError: they are not.
    """
    fusion = installation.anatomy.fusion
    assert fusion is not None
    for features in fusion.features:
        grid = arguments.get(features.per_image_arguments[0]) if features.granularity == "patches" else None
        if grid is not None:
            _check_count(features, merged_rows(grid, installation.anatomy.towers[0]), needed[features.method])


def _check_count(features: FeatureMethod, rows: int, needed: Shards) -> None:
    if rows != needed.total:
        raise InputError(
            features.token.removesuffix("_id"),
            expected=f"{rows} placeholders, as many as {features.method} returns features",
            found=f"{needed.total} in the batch",
            remedy="make ids and pixels by the model's own processor, and do not truncate the ids",
        )


# --- the composite -------------------------------------------------------------------------------------------------


def _run_composite(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The composite's forward on this rank's part of the tokens."""
    call = current(TextCall)
    if call is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    arguments = override.bind(args, kwargs)
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = _positions(override, arguments, call)
    given = arguments.get("mm_encoder_outputs")
    if isinstance(given, Mapping):
        arguments["mm_encoder_outputs"] = _part_of_outputs(given, call, override.installation)
    call = localise_text(arguments, call, override.installation)
    with active(call):
        return override.original(**arguments)


def _positions(override: Override, arguments: dict[str, Any], call: TextCall) -> Tensor:
    """The positions of all tokens, as the composite or its decoder would have made them."""
    composite: Any = override.module
    if hasattr(composite, "compute_3d_position_ids"):
        method = composite.compute_3d_position_ids
        positions = method(**{name: arguments.get(name) for name in inspect.signature(method).parameters})
        if positions is not None:
            return positions
    first = first_position(composite)
    return torch.arange(first, first + call.shape[1], device=call.index.device)[None]


def _part_of_outputs(given: Mapping[str, Any], call: TextCall, installation: Installation) -> dict[str, Any]:
    """FeatureMethod that the caller has made: this rank's rows of them."""
    fusion, group = installation.anatomy.fusion, installation.group
    assert fusion is not None
    part = dict(given)
    for features in fusion.features:
        modality = features.method.split("_")[1]
        if part.get(modality) is None:
            continue
        needed = call.needed[features.method]
        own = needed.range(group.rank)

        def pick(rows: Tensor, features: FeatureMethod = features, needed: Shards = needed, own: range = own) -> Tensor:
            _check_count(features, len(rows), needed)
            return rows[own.start : own.stop]

        out = part[modality] = _with_rows(copy.copy(part[modality]), pick)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [_with_rows(level, pick) for level in out.deepstack_features]
    return part


# --- features ------------------------------------------------------------------------------------------------------


def _run_features(features: FeatureMethod, override: Override, *args: Any, **kwargs: Any) -> Any:
    """A method that makes features: on this rank's pixels, and it returns the rows that this rank needs."""
    call = current(TextCall)
    if call is None:  # a direct call, or a method that calls another of the kind
        if current(Call) is None:
            refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    arguments = override.bind(args, kwargs)
    override.installation.last_rows[features.method] = call.needed[features.method]
    makers = {"patches": _from_patches, "images": _from_images, "frames": _from_frames}
    return makers[features.granularity](features, override, arguments, call.needed[features.method])


def _from_patches(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """The tower makes and routes the rows; the method around it is told of an image that has just this rank's."""
    installation = override.installation
    (stack,), group = installation.anatomy.towers, installation.group
    pixels, grids = next(iter(override.__signature__.parameters)), features.per_image_arguments[0]
    grid = arguments[grids]
    patches = cut_patches(stack, installation.config, group, grid, arguments[pixels].device)
    arguments[pixels] = patches.pick(arguments[pixels])
    merge = round(stack.unit**0.5)
    arguments[grids] = grid.new_tensor([[1, merge, merge * needed.sizes[group.rank]]])
    for name in patches.metadata:
        arguments.pop(name, None)

    def prepare(tower: TowerPass, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tower.outside = "patches"
        tower.cut_patches(patches.choice, patches.streams)
        tower.frames = patches.frames if stack.embeddings is not None else None
        return args, kwargs | patches.metadata

    with active(FeatureCall(prepare, partial(_route, patches, needed))):
        return override.original(**arguments)


def _route(patches: Patches, needed: Shards, tower: TowerPass, out: Any) -> Any:
    out.pooler_output = patches.route(out.pooler_output, needed)
    levels = getattr(out, "deepstack_features", None)
    if levels is not None:
        out.deepstack_features = [patches.route(level, needed) for level in levels]
    return out


def _from_images(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Ranks share out the images; one without any runs the first, to no effect, so that it takes part in everything."""
    group = override.installation.group
    name = next(iter(override.__signature__.parameters))
    whole = arguments[name].shape
    owns = _take_images(features, name, arguments, group)
    with active(_share_images(whole, stand_in=not owns)):
        out = override.original(**arguments)
    return _with_rows(out, lambda rows: _deliver(rows if owns else rows[:0], features, needed, group))


def _take_images(features: FeatureMethod, pixels: str, arguments: dict[str, Any], group: Group) -> bool:
    """Leave this rank's images in the arguments, or another's where it has none; return whether it has any."""
    names = [name for name in (pixels, *features.per_image_arguments) if arguments.get(name) is not None]
    per_sample = arguments.get("batch_num_images")
    if features.per_sample:
        real = arguments[pixels].flatten(0, 1).flatten(1).any(1).nonzero().flatten()
        own = shard_tokens(len(real), group.size).range(group.rank)
        index = real[own.start : own.stop] if own else torch.zeros(1, dtype=torch.long, device=real.device)
        for name in names:
            arguments[name] = arguments[name].flatten(0, 1)[index][:, None]
        return bool(own)
    entries = arguments[pixels] if per_sample is None else per_sample
    own = shard_tokens(len(entries), group.size).range(group.rank)
    taken = own or range(1)
    if per_sample is not None:  # how an image is tiled depends on how many its sample has: samples stay together
        starts = [0, *torch.as_tensor(per_sample).cumsum(0).tolist()]
        arguments["batch_num_images"] = per_sample[taken.start : taken.stop]
        taken = range(starts[taken.start], starts[taken.stop])
    for name in names:
        arguments[name] = arguments[name][taken.start : taken.stop]
    return bool(own)


def _from_frames(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Ranks share out the frames of all videos. The method ends what it is given by a row, the newline: it goes behind
    the last frame of each video."""
    group = override.installation.group
    name = next(iter(override.__signature__.parameters))
    videos, frames = (whole := arguments[name].shape)[:2]
    own = shard_tokens(videos * frames, group.size).range(group.rank)
    taken = own or range(1)
    arguments[name] = arguments[name].flatten(0, 1)[taken.start : taken.stop][None]
    with active(_share_images(whole, stand_in=not own)):
        out = override.original(**arguments)

    def deliver(rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for frame, part in zip(own, rows[:-1].chunk(len(taken)), strict=False):
            parts += [part, rows[-1:]] if (frame + 1) % frames == 0 else [part]
        return _deliver(torch.cat(parts) if parts else rows[:0], features, needed, group)

    return _with_rows(out, deliver)


def _share_images(pixels: torch.Size, stand_in: bool) -> FeatureCall:
    """Of pixels of the whole batch, (..., channels, height, width)."""

    def prepare(tower: TowerPass, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tower.outside, tower.stand_in, tower.pixels = "images", stand_in, tuple(pixels)
        return args, kwargs

    return FeatureCall(prepare, lambda tower, out: out)


def _deliver(rows: Tensor, features: FeatureMethod, needed: Shards, group: Group) -> Tensor:
    """The rows that this rank needs, from those that it has made."""
    made = Shards(tuple(count for (count,) in collectives.integers_of_all([len(rows)], group)))
    _check_count(features, made.total, needed)
    return stages.reshard(rows, made, needed, group)


def _with_rows(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a method returned, its rows changed: in an output object, or bare as transformers < 5 has it; images in a
    list or stacked."""
    held = getattr(out, "pooler_output", out)
    if isinstance(held, Tensor):
        rows = change(held.flatten(0, -2))
        changed: Any = rows if held.ndim == 2 else rows[:, None]
    else:
        changed = type(held)([change(torch.cat([part.flatten(0, -2) for part in held]))])
    if held is out:
        return changed
    out.pooler_output = changed
    return out
