"""Pixels that are cut before they are sent: `share_batches(loader, group, model=model)`.

The rank that has loaded a batch does what every rank would do in the forward: it plans the tower's stream of patches,
or shares out whole images. It sends each rank its part, and a `PixelShard` stands for this in the batch.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from triton_sp.anatomy.parts import FeatureMethod, device_of
from triton_sp.errors import GroupError, InputError, require
from triton_sp.plan.shards import shard_tokens
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.cuts import BY_IMAGES, PixelCut
from triton_sp.wrappers.fusion.images import empty_parts, rows_of_images
from triton_sp.wrappers.inputs.described import row_sums
from triton_sp.wrappers.inputs.values import check_pixels
from triton_sp.wrappers.install import Installation, installation_of
from triton_sp.wrappers.proof.first_call import is_proven
from triton_sp.wrappers.towers.patches import cut_patches


def cuttable(model: nn.Module, group: Group) -> Installation:
    """The installation of a wrapped model that takes a rank's part of the pixels in the place of all.

    Raises:
        InputError: the model takes none.
        GroupError: it is wrapped for other ranks.
    """
    installation = installation_of(model)
    if installation is None:
        raise InputError("model", expected="a wrapped model", found=type(model).__name__, remedy="wrap it first")
    same = (installation.group.size, installation.group.rank) == (group.size, group.rank)
    found = f"rank {installation.group.rank} of {installation.group.size}"
    expected = f"one wrapped for the group of the batches, rank {group.rank} of {group.size}"
    require(same, GroupError, "model", expected, found, "pass wrap and share_batches the same group")
    fusion, remedy = installation.anatomy.fusion, "leave model out, and batches are sent whole"
    if fusion is None or not any(map(_cuts, fusion.features)):
        why = "of whose features no part can be made of a part of the pixels (see triton_sp.explain)"
    elif installation.config.trial != "off" and not is_proven(installation.anatomy):
        why = "accepted by structure, which is compared with the unsharded model on all pixels of its first batches"
        remedy += ', or wrap with SPConfig(trial="off")'
    else:
        return installation
    name = type(installation.anatomy.entry).__name__
    expected = "a model whose features each rank makes of its own patches or images, such as Qwen2.5-VL"
    raise InputError("model", expected=expected, found=f"{name}, {why}", remedy=remedy)


def _cuts(features: FeatureMethod) -> bool:
    return features.granularity in ("patches", "images") and not features.per_sample


def cut_pixels(installation: Installation, batch: Any) -> dict[str, tuple[Tensor, PixelCut]]:
    """The pixels of a batch that can be cut, by name: the rows of all ranks, the first rank's first, and their cut.

    Pixels that some rank needs all of are not cut: those of a tower under the plan "replicate", of fewer images than
    ranks, and those beside arguments for which features are whole on every rank.

    Raises:
        InputError: the batch is no dict, or its pixels do not fit what is beside them.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            "batch", expected="a dict, as the model takes it", found=type(batch).__name__, remedy="leave model out"
        )
    anatomy = installation.anatomy
    fusion = anatomy.fusion
    assert fusion is not None
    if any(batch.get(name) is not None for name in fusion.gathered):
        return {}
    check_pixels(fusion, batch, anatomy.towers[0].unit if anatomy.towers else 1)
    found: dict[str, tuple[Tensor, PixelCut]] = {}
    for features in filter(_cuts, fusion.features):
        parameters = list(inspect.signature(getattr(type(fusion.module), features.method)).parameters)[1:]
        given = {name: batch[name] for name in parameters if batch.get(name) is not None}
        if not isinstance(given.get(parameters[0]), Tensor):
            continue
        cut = _by_patches if features.granularity == "patches" else _by_images
        whole = cut(installation, features, parameters[0], given)
        if whole is not None:
            found[parameters[0]] = whole
    return found


def _by_patches(
    installation: Installation, features: FeatureMethod, name: str, given: dict[str, Any]
) -> tuple[Tensor, PixelCut] | None:
    """By the plan of the tower, in the order in which it runs them."""
    (stack,), device = installation.anatomy.towers, device_of(installation.anatomy.entry)
    assert features.grid is not None
    patches = cut_patches(stack, installation.config, installation.group, given[features.grid], device)
    choice = patches.streams.choice
    if choice.plan == "replicate":
        return None
    return _described(patches.pick_of_all(given[name]), choice.shards.sizes, choice.plan, choice.why)


def _by_images(
    installation: Installation, features: FeatureMethod, name: str, given: dict[str, Any]
) -> tuple[Tensor, PixelCut] | None:
    """As images are shared out: evenly, in their order."""
    group, rows = installation.group, rows_of_images(given, name, features.grid)
    if isinstance(rows, str) or len(rows[name]) < group.size or empty_parts(rows, group):
        return None
    counts, images = rows[name], shard_tokens(len(rows[name]), group.size)
    if sum(counts) != len(given[name]):  # a strip of patches
        return None
    own = [images.range(rank) for rank in range(group.size)]
    return _described(given[name], tuple(sum(counts[part.start : part.stop]) for part in own), BY_IMAGES)


def _described(rows: Tensor, sizes: tuple[int, ...], plan: str, why: str = "") -> tuple[Tensor, PixelCut]:
    told = f"{tuple(rows.shape)} {rows.dtype} {plan} {sizes}".encode()
    content = told + row_sums(rows.detach()).cpu().numpy().tobytes()
    digest = hashlib.sha256(content, usedforsecurity=False).hexdigest()[:12]
    return rows.detach(), PixelCut(sizes, plan, digest, why)
