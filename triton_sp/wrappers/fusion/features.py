"""fuse: each rank makes the features of its part of the pixels, and is sent the rows that its placeholders need.

Placeholders and features are in the same order. So the rows that a rank needs are a range of all rows, which every rank
can tell from the ids of the whole batch, and one all-to-all brings them from the ranks that have made them.

What a rank's part of the pixels is depends on the method (`FeatureMethod.granularity`). Each of the three functions
below cuts the arguments of the method, says where the tower's tokens are then (placement.py), calls the method and
delivers its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import FeatureMethod, Fusion
from triton_sp.errors import InputError
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.cuts import refuse_shards
from triton_sp.wrappers.fusion.images import bounds, empty_parts, rows_of_images, take_from_samples, take_images
from triton_sp.wrappers.fusion.pooled import pointed_at_own, pooled_rows
from triton_sp.wrappers.inputs.layout import TextCall
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.scope import Call, active, current, refuse_lost_scope
from triton_sp.wrappers.towers.patches import merged_rows, patches_of
from triton_sp.wrappers.towers.placement import Images


def needed_rows(fusion: Fusion, tokens: Tensor, index: Tensor, shards: Shards) -> dict[str, Shards]:
    """How many features each rank's placeholders need, by the method that makes them.

    Args:
        tokens: (B, S) ids, or (B, S, C) embeddings, which are compared with the embeddings of the placeholders.
        index: (S',) where each token of the stream stands in the flattened batch.
        shards: how the stream is cut.
    """
    if not fusion.features:
        return {}
    module: Any = fusion.module
    ids = [getattr(module.config, features.token) for features in fusion.features]
    if tokens.ndim == 2:
        marked = torch.stack([tokens == token for token in ids])
    else:
        embeddings = module.get_input_embeddings()(torch.tensor(ids, device=tokens.device))
        marked = torch.stack([(tokens == embedding).all(-1) for embedding in embeddings])
    by_rank = marked.flatten(1)[:, index].cpu().split(list(shards.sizes), dim=1)  # the one wait for the device
    counts = torch.stack([part.sum(1) for part in by_rank], dim=1).tolist()
    return {features.method: Shards(tuple(rows)) for features, rows in zip(fusion.features, counts, strict=True)}


def check_rows(installation: Installation, arguments: Mapping[str, Any], needed: dict[str, Shards]) -> None:
    """Check that there are as many features as placeholders, where grids tell how many there will be. Where they don't,
    features are counted when they have been made.

    Raises:
        InputError: they differ.
    """
    fusion = installation.anatomy.fusion
    assert fusion is not None
    for features in fusion.features:
        grid = arguments.get(features.grid) if features.grid and features.granularity == "patches" else None
        if grid is not None:
            check_count(features, merged_rows(grid, installation.anatomy.towers[0]), needed[features.method])


def check_count(features: FeatureMethod, rows: int, needed: Shards) -> None:
    """Raise an InputError unless a method has made as many rows as the placeholders need."""
    if rows != needed.total:
        raise InputError(
            features.token.removesuffix("_id"),
            expected=f"{rows} placeholders, as many as {features.method} returns features",
            found=f"{needed.total} in the batch",
            remedy="make ids and pixels by the model's own processor, and do not truncate the ids",
        )


# --- making them ---------------------------------------------------------------------------------------------------


def make_features(features: FeatureMethod, override: Override, *args: Any, **kwargs: Any) -> Any:
    """A method that makes features, on this rank's pixels. It returns the rows that this rank's placeholders need."""
    call = current(TextCall)
    if current(Call) is None:  # a direct call
        refuse_shards(override.bind(args, kwargs), "in this call a rank makes all features by itself")
        refuse_lost_scope(override)
    # Or a method that calls another of the kind, or a call whose features are gathered.
    if call is None or not call.routes:
        refuse_shards(override.bind(args, kwargs), "every rank makes all features in this call")
        return override.original(*args, **kwargs)
    arguments, needed = override.bind(args, kwargs), call.needed[features.method]
    override.installation.last_rows[features.method] = needed
    override.installation.last_whole.pop(features.method, None)
    makers = {"patches": _from_patches, "images": _from_images, "frames": _from_frames, "whole": _from_whole}
    return makers[features.granularity](features, override, arguments, needed)


def _from_whole(
    features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards, why: str = "not cut"
) -> Any:
    """Every rank makes all rows, and keeps those that its placeholders need."""
    override.installation.last_whole[features.method] = why
    own = needed.range(override.installation.group.rank)
    with active(Call()):
        out = override.original(**arguments)

    def keep(rows: Tensor) -> Tensor:
        check_count(features, len(rows), needed)
        return rows[own.start : own.stop]

    return change_rows(out, keep)


def _from_patches(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Each rank makes the rows of its shard of the patches, from the pixels to the merger."""
    installation = override.installation
    (stack,), group = installation.anatomy.towers, installation.group
    pixels, grids = next(iter(override.__signature__.parameters)), features.grid
    assert grids is not None
    grid = arguments[grids]
    patches = patches_of(stack, installation.config, group, grid, arguments[pixels])
    arguments[pixels] = patches.pick(arguments[pixels])
    # Only the tower needs the real grids, and it is given what it would have worked out of them. The method around it
    # merely splits the tower's rows by image, so it gets the grid of one image with as many rows as this rank makes. It
    # stays on the CPU: to split, the method reads it, which on a GPU would wait for the whole tower.
    merge = round(stack.unit**0.5)
    arguments[grids] = torch.tensor([[1, merge, merge * (len(patches.own) // stack.unit)]], dtype=grid.dtype)
    for name in patches.arguments:
        arguments.pop(name, None)
    with active(Call(placement=patches)):
        out = override.original(**arguments)
    return change_rows(out, lambda rows: patches.deliver(rows, needed))


def _from_images(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Each rank makes the features of its images."""
    group = override.installation.group
    pixels = next(iter(override.__signature__.parameters))
    shape = tuple(arguments[pixels].shape)
    if features.per_sample and len(shape) == 5:
        taken, has_own = take_from_samples(pixels, arguments, group)
    else:
        rows, pointers = pooled_rows(arguments, pixels)
        rows = rows if pointers else rows_of_images(arguments, pixels, features.grid)
        reason = rows if isinstance(rows, str) else empty_parts(rows, group)
        if isinstance(rows, str) or reason:
            return _from_whole(features, override, arguments, needed, reason)
        shape = bounds(arguments, rows, pixels, packed=features.grid is not None)
        taken, has_own = take_images(rows, arguments, group)
        if pointers:
            taken[pointers] = pointed_at_own(taken[pointers], shape[1])
    # A rank without an image runs the first one to no effect: the model's own code needs one, and collectives that are
    # made on the way (the tower's, an engine's) need every rank. Of what it makes, no row counts.
    with active(Call(placement=Images(group, shape, stand_in=not has_own))):
        out = override.original(**arguments | taken)
    return change_rows(out, lambda rows: _deliver(rows if has_own else rows[:0], features, needed, group))


def _from_frames(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Each rank makes the features of its frames, of all frames of all videos (B, frames, channels, height, width).

    They are given to the method as one video, behind which it puts a row, the newline. In the batch that row stands
    behind the last frame of each video.
    """
    group = override.installation.group
    name = next(iter(override.__signature__.parameters))
    videos, frames = (shape := arguments[name].shape)[:2]
    own = shard_tokens(videos * frames, group.size).range(group.rank)
    taken = own or range(1)
    arguments[name] = arguments[name].flatten(0, 1)[taken.start : taken.stop][None]
    with active(Call(placement=Images(group, tuple(shape), stand_in=not own))):
        out = override.original(**arguments)

    def deliver(rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for frame, part in zip(own, rows[:-1].chunk(len(taken)), strict=False):
            parts += [part, rows[-1:]] if (frame + 1) % frames == 0 else [part]
        return _deliver(torch.cat(parts) if parts else rows[:0], features, needed, group)

    return change_rows(out, deliver)


# --- their rows ----------------------------------------------------------------------------------------------------


def _deliver(rows: Tensor, features: FeatureMethod, needed: Shards, group: Group) -> Tensor:
    """The rows that this rank needs, from those that it has made."""
    made = made_by_all(len(rows), needed, group)
    check_count(features, made.total, needed)
    return stages.reshard(rows, made, needed, group)


def made_by_all(rows: int, needed: Shards, group: Group) -> Shards:
    """How many rows each rank has made: they tell one another. A plan, which has no others, takes what is needed."""
    return Shards(tuple(count for (count,) in collectives.integers_of_all([rows], group)))


def change_rows(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a method returned, with other rows: (rows, C) to (other rows, C).

    Args:
        out: an output object, which is changed: its `pooler_output`, or without one its `last_hidden_state`, and each
            level of its `deepstack_features`. Or the rows themselves, as transformers < 5 has it. Rows are a tensor for
            each image in a list, or stacked.
    """
    levels = getattr(out, "deepstack_features", None)
    if levels is not None:
        out.deepstack_features = [_change_level(level, change) for level in levels]
    name = "last_hidden_state" if getattr(out, "pooler_output", out) is None else "pooler_output"
    held = getattr(out, name, out)
    if held is None:  # there are levels only
        return out
    if isinstance(held, Tensor):
        rows = change(held.flatten(0, -2))
        changed: Any = rows if held.ndim == 2 else rows[:, None]
    else:
        parts = [part.flatten(0, -2) for part in held]
        changed = type(held)([change(parts[0] if len(parts) == 1 else torch.cat(parts))])
    if held is out:
        return changed
    setattr(out, name, changed)
    return out


def _change_level(level: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A level of features, which may come with the number of the layer that it goes to (Granite 4 Vision)."""
    if isinstance(level, tuple) and isinstance(level[0], int):
        return (level[0], change_rows(level[1], change))
    return change_rows(level, change)
