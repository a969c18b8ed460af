"""Patches: the placement of towers of packed patches (Qwen-VL, GLM-4V). Each rank is given the pixels of its shard, and
what the tower would have worked out of the grids for them.

Since 5.17 transformers computes what a tower has to know about its patches (positions, segments, the order of windows)
by functions beside the tower, and towers take the results as arguments. So these are called for the whole batch here,
and the tower's own forward runs on this rank's rows of the results, from the patch embedding to the merger.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp import stages
from triton_sp.anatomy.parts import Stack
from triton_sp.config import SPConfig
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.cuts import PixelShard
from triton_sp.wrappers.planning import plan_stack
from triton_sp.wrappers.towers.hidden import HiddenShape
from triton_sp.wrappers.towers.placement import Placement, Streams


@dataclass(eq=False)
class Patches(Placement):
    """Each rank has its shard of the patches, outside of the blocks and inside: nothing moves at their ends.

    The stream is cut before the tower runs, anywhere between merge units (the neighbouring patches that the merger
    makes one row of). With the plan "replicate" the shard of every rank is all patches.

    Attributes:
        streams: the cut, and the streams in the segments that blocks will be given.
        order: (merge units,) int64 on the CPU, in which order the tower runs the merge units; None for their own order.
        merge: patches in a merge unit.
        grid: (images, 3), frames, height and width of each image in patches.
        arguments: what the tower's forward needs to know of this rank's patches, and the segments of all.
    """

    group: Group
    streams: Streams
    order: Tensor | None
    merge: int
    grid: Tensor

    def plan(self, stack: Stack, config: SPConfig, hidden: HiddenShape, like: Tensor, cu: Tensor | None) -> Streams:
        """The streams that were planned before the tower ran."""
        return self.streams

    def enter(self, rows: Tensor, stream: Stream) -> Tensor:
        """The rows themselves, which are the shard."""
        return rows

    def leave(self, local: Tensor, stream: Stream) -> Tensor:
        """The shard itself."""
        return local

    def leave_merged(self, rows: Tensor, stream: Stream, unit: int) -> Tensor:
        """The rows themselves."""
        return rows

    @property
    def own(self) -> range:
        """This rank's patches, in the tower's order."""
        return self.streams.first.own

    @property
    def frames(self) -> tuple[Tensor, Tensor]:
        """The frames that this rank has patches of: how many patches, and (1, height, width) of the whole frame."""
        own, each = self.own, self.grid.repeat_interleave(self.grid[:, 0], 0)
        sizes = each[:, 1:].prod(-1)
        stops = sizes.cumsum(0)
        counts = stops.clamp(max=own.stop) - (stops - sizes).clamp(min=own.start)
        return counts[counts > 0], each.index_fill(1, self.grid.new_zeros(1), 1)[counts > 0]

    def pick(self, pixels: Tensor | PixelShard) -> Tensor:
        """This rank's rows of pixels that have a row for each patch of the batch."""
        return pixels.rows if isinstance(pixels, PixelShard) else _pick(pixels, self.own, self.order, self.merge)

    def pick_of_all(self, pixels: Tensor) -> Tensor:
        """The rows of pixels in the order of the tower: those of the first rank, then those of the second."""
        return _pick(pixels, range(len(pixels)), self.order, self.merge)

    def deliver(self, rows: Tensor, needed: Shards) -> Tensor:
        """The merged rows that this rank's placeholders need, from those that were made of this rank's patches."""
        if self.streams.choice.plan == "replicate":
            order = None if self.order is None else torch.argsort(self.order)
            return _pick(rows, needed.range(self.group.rank), order, 1)
        return stages.reshard(rows, self.streams.choice.shards.merged(self.merge), needed, self.group, self.order)


def _pick(x: Tensor, own: range, order: Tensor | None, merge: int) -> Tensor:
    return x[own.start : own.stop] if order is None else x[_places(own, order, merge).to(x.device)]


def _places(own: range, order: Tensor | None, merge: int) -> Tensor:
    """Where these patches of the tower's order lie in the batch."""
    if order is None:
        return torch.arange(own.start, own.stop)
    units = order[own.start // merge : own.stop // merge]
    return (units[:, None] * merge + torch.arange(merge)).flatten()


def merged_rows(grid: Tensor, stack: Stack) -> int:
    """How many rows a tower makes of patches with these (frames, height, width)."""
    return int(grid.prod(-1).sum()) // stack.unit


def patches_of(stack: Stack, config: SPConfig, group: Group, grid: Tensor, pixels: Tensor | PixelShard) -> Patches:
    """The patches of a batch, cut by the plan that was made for them here, or where they were loaded.

    Raises:
        InputError: they were cut otherwise than they are by this model's plan of that name.
    """
    if isinstance(pixels, Tensor):
        return cut_patches(stack, config, group, grid, pixels.device)
    plan: Any = pixels.cut.plan
    patches = cut_patches(stack, replace(config, plan=plan), group, grid, pixels.rows.device)
    choice = patches.streams.choice
    pixels.expect(choice.shards.sizes, choice.plan)
    patches.streams.choice = replace(choice, why=f"on the rank that loaded the batch {pixels.cut.why}")
    return patches


def cut_patches(stack: Stack, config: SPConfig, group: Group, grid: Tensor, device: torch.device) -> Patches:
    """Cut the patches of a batch.

    Args:
        grid: (images, 3), frames, height and width of each in patches.
        device: of the pixels.

    All is worked out on the CPU: these are dozens of small operators for each image, and their results decide how large
    things are. On a GPU each would be a launch, and each size a wait for all that was launched before. What is known
    patch by patch is worked out for the images that this rank has patches of: 0.4 s for a million patches.
    """
    from transformers import vision_utils

    tower: Any = stack.module
    grid = grid.cpu()
    merge = tower.spatial_merge_size
    segments, order = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}, None  # those of the first block first
    if "get_vision_window_index" in _uses(tower):
        order, windows = vision_utils.get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        in_windows = {"cu_window_seqlens": windows}
        segments = segments | in_windows if 0 in tower.fullatt_block_indexes else in_windows | segments
    host = {name: Segments(tuple(cu.tolist())) for name, cu in segments.items()}
    like = torch.empty(0, tower.patch_embed.embed_dim, dtype=next(tower.parameters()).dtype, device=device)
    streams = Streams(group, plan_stack(stack, config, group, next(iter(host.values())), like))
    arguments = {name: cu.to(device, non_blocking=True) for name, cu in segments.items()}
    for name, values in host.items():
        streams.of(arguments[name], values)
    own = streams.first.own
    for name, value in _tables(tower, grid, _places(own, order, stack.unit)).items():
        arguments[name] = value.to(device, non_blocking=True)
    if order is not None:  # this rank's units come in the order of windows already
        arguments["window_index"] = torch.arange(len(own) // stack.unit, device=device)
    return Patches(group, streams, order, stack.unit, grid, arguments=arguments)


def _uses(tower: nn.Module) -> tuple[str, ...]:
    """The functions that a tower's forward calls, among other names."""
    return inspect.unwrap(type(tower).forward).__code__.co_names


def _tables(tower: Any, grid: Tensor, places: Tensor) -> dict[str, Tensor]:
    """What a tower's forward needs to know of each of the patches at these places of the batch: a row a patch."""
    from transformers import vision_utils

    sizes = grid.prod(-1)
    stops = sizes.cumsum(0)
    first, last = torch.searchsorted(stops, torch.stack(places.aminmax()), right=True).tolist()
    grid, places, merge = grid[first : last + 1], places - (stops - sizes)[first], tower.spatial_merge_size
    tables = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    if "get_vision_interpolation_indices_and_weights" in _uses(tower):
        tables["interp_indices"], tables["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    return {name: table[places] for name, table in tables.items()}
