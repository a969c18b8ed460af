"""Towers of packed patches (Qwen-VL): each rank gets its pixels, and what the tower would have worked out of the grids.

Since 5.17 transformers computes what a tower has to know about its patches (positions, segments, the order of windows)
by functions beside the tower, and towers take the results as arguments. So the whole batch's are computed here, and
the tower's own forward runs on this rank's rows, from the patch embedding to the merger.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.plan.cost import PlanChoice
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.planning import plan_tower


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a batch, cut.

    Attributes:
        metadata: arguments for the tower's forward: of this rank's patches, segments those of all.
        streams: cu_seqlens as the blocks will hand them out, and their values; those of the first block first.
        order: (units,) int64 on the CPU, in which order the tower runs the merge units, or None for their own.
        unit: patches in a merge unit.
        grid: (images, 3), frames, height and width of each in patches.
    """

    group: Group
    choice: PlanChoice
    metadata: dict[str, Any]
    streams: list[tuple[Tensor, Segments]]
    order: Tensor | None
    unit: int
    grid: Tensor

    @property
    def own(self) -> range:
        """This rank's patches, in the tower's order."""
        if self.choice.plan == "replicate":
            return range(self.choice.shards.total)
        return self.choice.shards.range(self.group.rank)

    @property
    def frames(self) -> tuple[Tensor, Tensor]:
        """The frames that this rank has patches of: how many patches, and (1, height, width) of the whole frame."""
        own, each = self.own, self.grid.repeat_interleave(self.grid[:, 0], 0)
        starts = [0, *each[:, 1:].prod(-1).cumsum(0).tolist()]
        counts = [min(stop, own.stop) - max(start, own.start) for start, stop in pairwise(starts)]
        index = [frame for frame, count in enumerate(counts) if count > 0]
        counts = self.grid.new_tensor([counts[frame] for frame in index])
        return counts, each[index].index_fill(1, self.grid.new_zeros(1), 1)

    def pick(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor with a row for each patch."""
        return _pick(x, self.own, self.order, self.unit)

    def route(self, rows: Tensor, needed: Shards) -> Tensor:
        """The merged rows that this rank's placeholders need, from those that its patches gave."""
        if self.choice.plan == "replicate":
            wanted = needed.range(self.group.rank)
            if self.order is None:
                return rows[wanted.start : wanted.stop]
            return rows[torch.argsort(self.order)[wanted.start : wanted.stop].to(rows.device)]
        return stages.reshard(rows, self.choice.shards.merged(self.unit), needed, self.group, self.order)


def _pick(x: Tensor, own: range, order: Tensor | None, unit: int) -> Tensor:
    if order is None:
        return x[own.start : own.stop]
    units = order[own.start // unit : own.stop // unit].to(x.device)
    return x.unflatten(0, (-1, unit))[units].flatten(0, 1)


def merged_rows(grid: Tensor, stack: Stack) -> int:
    """How many rows a tower makes of patches with these (frames, height, width)."""
    return int(grid.prod(-1).sum()) // stack.unit


def cut_patches(stack: Stack, config: SPConfig, group: Group, grid: Tensor, device: torch.device) -> Patches:
    """Cut the patches of a batch.

    Args:
        grid: (images, 3), frames, height and width of each in patches.
        device: of the pixels.
    """
    from transformers import vision_utils

    tower: Any = stack.module
    uses = inspect.unwrap(type(tower).forward).__code__.co_names
    merge = tower.spatial_merge_size
    cu_seqlens = vision_utils.get_vision_cu_seqlens(grid)
    of_patches = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    metadata: dict[str, Any] = {"cu_seqlens": cu_seqlens}
    streams, order = [cu_seqlens], None
    if "get_vision_window_index" in uses:
        order, windows = vision_utils.get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        order = order.cpu()
        metadata["cu_window_seqlens"] = windows
        streams = [cu_seqlens, windows] if 0 in tower.fullatt_block_indexes else [windows, cu_seqlens]
    if "get_vision_interpolation_indices_and_weights" in uses:
        of_patches["interp_indices"], of_patches["interp_weights"] = (
            vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
        )
    known = [(cu, Segments(tuple(cu.tolist()))) for cu in streams]
    like = torch.empty(0, tower.patch_embed.embed_dim, dtype=next(tower.parameters()).dtype, device=device)
    choice = plan_tower(stack, config, group, known[0][1], like)
    patches = Patches(group, choice, metadata, known, order, stack.unit, grid)
    metadata |= {name: patches.pick(value) for name, value in of_patches.items()}
    if order is not None:  # this rank's units come in the order of windows already
        metadata["window_index"] = torch.arange(len(patches.own) // stack.unit)
    return patches
