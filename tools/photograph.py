"""The picture of who owns which patch of a photograph, on 3 ranks. `python -m tools.photograph`.

Cuts are computed by the library's own planning, for a tower with the windows of Qwen2.5-VL.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import numpy as np
import sklearn.datasets
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import vision_utils

from triton_sp.plan.segments import Segments, shard_segments
from triton_sp.plan.shards import Shards, shard_tokens

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "photograph.jpg"
RANKS, PATCH, MERGE, WINDOW = 3, 14, 2, 112
COLOURS = np.array([[76, 120, 200], [242, 160, 61], [84, 162, 75]]) / 255


def owners(grid: Tensor, shards: Shards, order: Tensor) -> np.ndarray:
    """(height, width) of merge units: the rank that owns each, where the tower runs unit `order[i]` as its i-th."""
    units = MERGE * MERGE
    rank = torch.arange(RANKS).repeat_interleave(torch.tensor([size // units for size in shards.sizes]))
    raster = torch.empty_like(rank)
    raster[order] = rank
    return raster.view(int(grid[0, 1]) // MERGE, int(grid[0, 2]) // MERGE).numpy()


def main() -> None:
    """Draw the photograph three times: as it is, cut evenly, and cut where windows end."""
    pixels = sklearn.datasets.load_sample_images().images[0]  # china.jpg
    side = PATCH * MERGE
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    pixels = pixels[: rows * side, : columns * side]
    grid = torch.tensor([[1, rows * MERGE, columns * MERGE]])
    order, windows = vision_utils.get_vision_window_index(grid, MERGE, WINDOW, PATCH)
    segments = Segments(tuple(windows.tolist()))
    whole = shard_segments(segments, RANKS, np.diff(segments.table), MERGE * MERGE)
    even = shard_tokens(int(grid.prod()), RANKS, MERGE * MERGE)
    cuts = [None, (even, torch.arange(len(order))), (whole, order)]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    titles = ["the photograph", "plan heads: cut evenly", "plan segments: cut where windows end"]
    for axis, title, cut in zip(axes, titles, cuts, strict=True):
        axis.imshow(pixels)
        axis.set_title(title, fontsize=12, fontweight="bold", loc="left")
        axis.set_axis_off()
        if cut is not None:
            shards, places = cut
            tint = COLOURS[owners(grid, shards, places)].repeat(side, 0).repeat(side, 1)
            axis.imshow(tint, alpha=0.55)
            sizes = " + ".join(str(size) for size in shards.sizes)
            axis.text(0, pixels.shape[0] + 6, f"{sizes} patches", fontsize=11, va="top")
        for x in range(0, columns * side, WINDOW):
            axis.axvline(x, color="white", linewidth=0.6)
        for y in range(0, rows * side, WINDOW):
            axis.axhline(y, color="white", linewidth=0.6)
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main()
