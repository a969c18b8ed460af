"""The picture of the README: who holds which tokens and heads at each stage, on 2 ranks. `python -m tools.picture`.

Owners are computed by the library's own planning, so the picture shows what happens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from triton_sp.plan.heads import assign_heads
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "stages.svg"
COLOURS, EMPTY, EDGE = ("#4c78c8", "#f2a03d"), "#f4f4f4", "#ffffff"
RANKS, MERGE = 2, 2
IMAGES = Segments((0, 8, 12))  # two images: 8 and 4 patches, of which 2 become one feature
# A row of text: letters are words, digits are placeholders of that visual feature.
TEXT = "ab0123cd45efgh"
Owner = Callable[[int, int], int | None]


def by_tokens(tokens: int, unit: int = 1) -> Owner:
    """Who holds a token of a stream that is cut evenly; all its heads."""
    shards = shard_tokens(tokens, RANKS, unit)
    return lambda row, head: next(rank for rank in range(RANKS) if row in shards.range(rank))


def by_heads(heads: int, segments: Segments, causal: bool) -> Owner:
    """Who attends for a row in a head."""
    tasks = assign_heads(heads, heads, RANKS, segments.work(causal=causal))
    return lambda row, head: next(
        rank for rank in range(RANKS) if any(head in task.q and row in task.rows for task in tasks[rank])
    )


def grid(axes: Any, left: float, rows: int, columns: int, owner: Owner, labels: str = "") -> None:
    """Tokens from top to bottom, heads from left to right, coloured by rank; a letter in each token's first cell."""
    for row in range(rows):
        for column in range(columns):
            who = owner(row, column)
            colour = EMPTY if who is None else COLOURS[who]
            axes.add_patch(Rectangle((left + column, -row - 1), 1, 1, facecolor=colour, edgecolor=EDGE, linewidth=1))
        if labels:
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white", "fontweight": "bold"}
            axes.text(left + columns / 2, -row - 0.5, labels[row], **style)


def panel(axes: Any, title: str, text: str, rows: int) -> None:
    """An empty panel with a title above and an explanation below."""
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.text(0, -rows - 0.5, text, fontsize=8.5, va="top", linespacing=1.35)
    axes.set_xlim(-1.2, 8.2)
    axes.set_ylim(-rows - 2.8, 0.6)
    axes.set_aspect("equal")
    axes.axis("off")


def bracket(axes: Any, segments: Segments, x: float, names: tuple[str, ...]) -> None:
    """The segments beside a grid: tokens that see one another."""
    for name, start, stop in zip(names, segments.starts, segments.starts[1:], strict=False):
        axes.plot([x, x + 0.3, x + 0.3, x], [-start - 0.1, -start - 0.1, -stop + 0.1, -stop + 0.1], color="#444", lw=1)
        axes.text(x + 0.6, -(start + stop) / 2, name, fontsize=8.5, va="center")


def tower(axes: Any) -> None:
    """The stages of a layer of the vision tower, with 4 heads."""
    patches, names = IMAGES.starts[-1], ("image 1", "image 2")
    local, heads = by_tokens(patches, MERGE), by_heads(4, IMAGES, causal=False)
    for place, owner, title, text in (
        (axes[0], local, "shard", "Each rank has half of the\npatches, with all heads."),
        (axes[1], heads, "pack, exchange", "One all-to-all: each rank gets\nall patches of half of the heads."),
        (axes[2], heads, "attend", "In its heads, a rank attends\ninside each whole image."),
        (axes[3], local, "exchange, unpack", "One all-to-all back. The MLP\nand norms run on own patches."),
    ):
        panel(place, title, text, patches)
        grid(place, 0, patches, 4, owner)
        if title == "attend":
            bracket(place, IMAGES, 4.3, names)
    axes[0].text(-0.6, -patches / 2, "patches", rotation=90, ha="center", va="center", fontsize=8.5)
    axes[0].text(2, 0.15, "heads", ha="center", fontsize=8.5)


def fuse(axes: Any) -> None:
    """Features, on the rank that made them, go to the rank that has their placeholder."""
    features, tokens = IMAGES.starts[-1] // MERGE, len(TEXT)
    made, needed = by_tokens(features), by_tokens(tokens)
    panel(axes, "fuse", "A feature goes to the rank that\nhas its placeholder (red: another one).", tokens)
    grid(axes, 0, features, 1, made, "012345")
    grid(axes, 5, tokens, 1, needed, TEXT)
    for feature in range(features):
        row = TEXT.index(str(feature))
        crosses = made(feature, 0) != needed(row, 0)
        style = {"arrowstyle": "-|>", "mutation_scale": 7, "color": "#c0392b" if crosses else "#888", "lw": 1.0}
        axes.add_patch(FancyArrowPatch((1.1, -feature - 0.5), (4.9, -row - 0.5), **style))
    axes.text(0.5, 0.15, "features", ha="center", fontsize=8.5)
    axes.text(5.5, 0.15, "text", ha="center", fontsize=8.5)


def decoder(axes: Any) -> None:
    """The language model, with 3 heads, which 2 ranks cannot divide; and the loss."""
    tokens = len(TEXT)
    text = Segments((0, tokens))
    local, heads = by_tokens(tokens), by_heads(3, text, causal=True)
    panel(axes[1], "shard", "The language model works the\nsame way on its tokens.", tokens)
    grid(axes[1], 0, tokens, 3, local)
    panel(axes[2], "exchange, attend", "3 heads for 2 ranks: the middle\none is cut where the work halves.", tokens)
    grid(axes[2], 0, tokens, 3, heads)
    panel(axes[3], "loss", "Each rank sums over its tokens;\nthe total is the batch's loss.", tokens)
    grid(axes[3], 0, tokens, 1, local)
    shards = shard_tokens(tokens, RANKS)
    for rank in range(RANKS):
        own = shards.range(rank)
        axes[3].text(1.5, -(own.start + own.stop) / 2, f"share of rank {rank}", fontsize=8.5, va="center")


def main() -> None:
    """Draw the picture."""
    plt.rcParams.update({"svg.hashsalt": "triton_sp", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(2, 4, figsize=(11, 8.6))
    tower(axes[0])
    fuse(axes[1][0])
    decoder(axes[1])
    for row, name in enumerate(("vision tower: one layer", "language model")):
        axes[row][0].text(-1.2, 2.6, name, fontsize=12.5, fontweight="bold", color="#222")
    for rank, colour in enumerate(COLOURS):
        figure.patches.append(
            Rectangle((0.66 + 0.13 * rank, 0.962), 0.018, 0.018, transform=figure.transFigure, facecolor=colour)
        )
        figure.text(0.685 + 0.13 * rank, 0.964, f"on rank {rank}", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.99, top=0.89, bottom=0.0, hspace=0.16, wspace=0.02)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
