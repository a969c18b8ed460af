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
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.layout import TextCall
from triton_sp.wrappers.patches import cut_patches, merged_rows
from triton_sp.wrappers.placement import Images
from triton_sp.wrappers.scope import Call, active, current, refuse_lost_scope


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
        grid = arguments.get(features.per_image_arguments[0]) if features.granularity == "patches" else None
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
    if call is None:  # a direct call, or a method that calls another of the kind
        if current(Call) is None:
            refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    arguments, needed = override.bind(args, kwargs), call.needed[features.method]
    override.installation.last_rows[features.method] = needed
    makers = {"patches": _from_patches, "images": _from_images, "frames": _from_frames}
    return makers[features.granularity](features, override, arguments, needed)


def _from_patches(features: FeatureMethod, override: Override, arguments: dict[str, Any], needed: Shards) -> Any:
    """Each rank makes the rows of its shard of the patches, from the pixels to the merger."""
    installation = override.installation
    (stack,), group = installation.anatomy.towers, installation.group
    pixels, grids = next(iter(override.__signature__.parameters)), features.per_image_arguments[0]
    grid = arguments[grids]
    patches = cut_patches(stack, installation.config, group, grid, arguments[pixels].device)
    arguments[pixels] = patches.pick(arguments[pixels])
    # Only the tower needs the real grids, and it is given what it would have worked out of them. The method around it
    # merely splits the tower's rows by image, so it gets the grid of one image with as many rows as this rank makes.
    merge = round(stack.unit**0.5)
    arguments[grids] = grid.new_tensor([[1, merge, merge * (len(patches.own) // stack.unit)]])
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
    if features.per_sample:
        taken, has_own = _take_from_samples(features, pixels, arguments, group)
    else:
        taken, has_own = _take_images(features, pixels, arguments, group)
    # A rank without an image runs the first one to no effect: the model's own code needs one, and collectives that are
    # made on the way (the tower's, an engine's) need every rank. Of what it makes, no row counts.
    with active(Call(placement=Images(group, shape, stand_in=not has_own))):
        out = override.original(**arguments | taken)
    return change_rows(out, lambda rows: _deliver(rows if has_own else rows[:0], features, needed, group))


def _take_from_samples(
    features: FeatureMethod, pixels: str, arguments: Mapping[str, Any], group: Group
) -> tuple[dict[str, Any], bool]:
    """The arguments with this rank's images, or with the first image if it has none, and whether it has any. Each entry
    is a sample's images, filled up with images of zeros."""
    real = arguments[pixels].flatten(0, 1).flatten(1).any(1).nonzero().flatten()
    own = shard_tokens(len(real), group.size).range(group.rank)
    index = real[own.start : own.stop] if own else torch.zeros(1, dtype=torch.long, device=real.device)
    names = _per_image(features, pixels, arguments)
    return {name: arguments[name].flatten(0, 1)[index][:, None] for name in names}, bool(own)


def _take_images(
    features: FeatureMethod, pixels: str, arguments: Mapping[str, Any], group: Group
) -> tuple[dict[str, Any], bool]:
    """The same where each entry is an image."""
    by_sample, changed = arguments.get("batch_num_images"), {}
    own = shard_tokens(len(arguments[pixels] if by_sample is None else by_sample), group.size).range(group.rank)
    taken = own or range(1)
    if by_sample is not None:  # how an image is tiled depends on how many its sample has: samples stay together
        starts = [0, *torch.as_tensor(by_sample).cumsum(0).tolist()]
        changed["batch_num_images"] = by_sample[taken.start : taken.stop]
        taken = range(starts[taken.start], starts[taken.stop])
    names = _per_image(features, pixels, arguments)
    return changed | {name: arguments[name][taken.start : taken.stop] for name in names}, bool(own)


def _per_image(features: FeatureMethod, pixels: str, arguments: Mapping[str, Any]) -> list[str]:
    return [name for name in (pixels, *features.per_image_arguments) if arguments.get(name) is not None]


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
    made = Shards(tuple(count for (count,) in collectives.integers_of_all([len(rows)], group)))
    check_count(features, made.total, needed)
    return stages.reshard(rows, made, needed, group)


def change_rows(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a method returned, with other rows: (rows, C) to (other rows, C).

    Args:
        out: an output object, which is changed: its `pooler_output`, and each level of its `deepstack_features`. Or the
            rows themselves, as transformers < 5 has it. Rows are a tensor for each image in a list, or stacked.
    """
    levels = getattr(out, "deepstack_features", None)
    if levels is not None:
        out.deepstack_features = [change_rows(level, change) for level in levels]
    held = getattr(out, "pooler_output", out)
    if isinstance(held, Tensor):
        rows = change(held.flatten(0, -2))
        changed: Any = rows if held.ndim == 2 else rows[:, None]
    else:
        parts = [part.flatten(0, -2) for part in held]
        changed = type(held)([change(parts[0] if len(parts) == 1 else torch.cat(parts))])
    if held is out:
        return changed
    out.pooler_output = changed
    return out
