"""Pixels that are cut before they are sent: `share_batches(loader, group, model=model)`.

The rank that has loaded a batch plans the tower's stream, as every rank does in the forward, and sends each rank the
patches that its part of the tower will run. In the batch a `PixelShard` stands for them. Only patches can be cut so far
ahead: where images go, a tower of whole images decides when it has embedded them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from triton_sp.anatomy.parts import FeatureMethod, device_of
from triton_sp.errors import GroupError, InputError, require
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.inputs.described import row_sums
from triton_sp.wrappers.inputs.values import check_pixels
from triton_sp.wrappers.install import Installation, installation_of
from triton_sp.wrappers.proof.first_call import is_proven
from triton_sp.wrappers.towers.patches import PixelShard, cut_patches


def cuttable(model: nn.Module, group: Group) -> Installation:
    """The installation of a wrapped model that takes a rank's patches in the place of all.

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
    fusion = installation.anatomy.fusion
    tried = installation.config.trial != "off" and not is_proven(installation.anatomy)
    if fusion is None or not any(map(_cuts, fusion.features)):
        why = "without a tower whose features are cut between patches (triton_sp.explain says how they are made)"
    elif tried:
        why = "accepted by structure, which is compared with the unsharded model on all pixels of its first batches"
    else:
        return installation
    raise InputError(
        "model",
        expected="a model whose tower can be given a rank's patches alone, such as Qwen2.5-VL",
        found=f"{type(installation.anatomy.entry).__name__}, {why}",
        remedy='leave model out, and batches are sent whole; or wrap with SPConfig(trial="off")' * tried
        or "leave model out, and batches are sent whole",
    )


def _cuts(features: FeatureMethod) -> bool:
    return features.granularity == "patches" and features.grid is not None


def cut_pixels(installation: Installation, batch: Any) -> dict[str, PixelShard]:
    """The pixels of a batch that can be cut, by name, each with the rows of all ranks, the first rank's first.

    Pixels of which every rank makes all features are not cut: those under the plan "replicate", and those beside
    arguments for which features are whole on every rank.

    Raises:
        InputError: the batch is no dict, or its pixels do not fit their grids.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            "batch", expected="a dict, as the model takes it", found=type(batch).__name__, remedy="leave model out"
        )
    anatomy, group = installation.anatomy, installation.group
    fusion, stack = anatomy.fusion, anatomy.towers[0]
    assert fusion is not None
    if any(batch.get(name) is not None for name in fusion.gathered):
        return {}
    check_pixels(fusion, batch, stack.unit)
    found: dict[str, PixelShard] = {}
    for features in filter(_cuts, fusion.features):
        name = list(inspect.signature(getattr(type(fusion.module), features.method)).parameters)[1]
        pixels = batch.get(name)
        if pixels is None or pixels.ndim != 2:
            continue
        grid = batch[features.grid].to("cpu")
        patches = cut_patches(stack, installation.config, group, grid, device_of(anatomy.entry))
        choice = patches.streams.choice
        if choice.plan == "replicate":
            continue
        told = f"{tuple(pixels.shape)} {pixels.dtype} {choice.plan} {choice.shards.sizes}".encode()
        content = told + row_sums(pixels.detach()).cpu().numpy().tobytes()
        digest = hashlib.sha256(content, usedforsecurity=False).hexdigest()[:12]
        found[name] = PixelShard(patches.pick_of_all(pixels), choice.plan, choice.shards.sizes, digest, choice.why)
    return found


def refuse_shards(arguments: Mapping[str, Any], why: str) -> None:
    """Raise an InputError for pixels of which this rank has a part, in a call that needs all."""
    for name, value in arguments.items():
        if isinstance(value, PixelShard):
            raise InputError(
                name,
                expected=f"all pixels: {why}",
                found="this rank's patches",
                remedy="call share_batches without model for these batches",
            )
