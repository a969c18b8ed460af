"""What `triton-sp plan` prints: forecasts as a table for people, as JSON for programs, or as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from triton_sp.forecast.step import Forecast

HELD = ("parameters", "gradients", "optimizer", "activations")
SIZES = (*HELD, "forward_peak", "backward_peak", "offloaded", "total", "sent_in_step")


def as_table(rows: Sequence[Forecast], gpu_memory: float | None = None) -> str:
    """Lines for people. `gpu_memory`: GB of a GPU, of which the rows then say whether the step fits, and about how many
    tokens of such a batch would."""
    heads = ["P", "tokens", "of the rank", *(f"{name.replace('_', ' ')} GB" for name in SIZES), "est. s", "plans"]
    cells = [heads + (["fits", "largest, about"] if gpu_memory else [])]
    for row in rows:
        line = [f"{row.ranks}", f"{row.tokens:,}", f"{row.own_tokens:,}"]
        line += [f"{getattr(row, name) / 1e9:.3g}" for name in SIZES]
        line += [f"{row.seconds:.3g}", ", ".join(f"{name.split('.')[-2]} {plan}" for name, plan in row.plans.items())]
        if gpu_memory:
            line += ["yes" if row.total <= gpu_memory * 1e9 else "no", f"{row.largest(gpu_memory * 1e9):,}"]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in cells)


def as_json(rows: Sequence[Forecast]) -> str:
    """For programs: a list of objects with the fields of `Forecast`."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def draw(rows: Sequence[Forecast], file: str | Path, gpu_memory: float | None = None) -> None:
    """A picture: what a rank holds at its peak, for each size of a group, and the memory of a GPU as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = [f"P = {row.ranks}" for row in rows]
    bottom = [0.0] * len(rows)
    parts = {name: [getattr(row, name) for row in rows] for name in HELD}
    peaks = [max(row.forward_peak, row.backward_peak) for row in rows]
    parts["the rest of the peak"] = [max(peak - row.activations, 0) for peak, row in zip(peaks, rows, strict=True)]
    for name, sizes in parts.items():
        heights = [size / 1e9 for size in sizes]
        axes.bar(names, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if gpu_memory:
        axes.axhline(gpu_memory, color="black", linestyle="--", label="memory of a GPU")
    axes.set_ylabel("GB a rank")
    axes.set_title(f"{rows[0].tokens:,} tokens")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
