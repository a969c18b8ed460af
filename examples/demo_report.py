"""What the demo shows: a table, a plot, and the verdict, all from its CSV file."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, in float32
ORANGE, GREY = "#e07a3f", "#9aa5b1"
MB = 1e6


def report(csv: Path, png: Path) -> int:
    """Print and plot what stands in the CSV file; the exit code is 0 if all ranks computed what one process did."""
    table = pd.read_csv(csv)
    table["loss_error"] = (table["loss"] - table["loss_one_process"]).abs() / table["loss_one_process"].abs()
    for name, rows in table.groupby("model", sort=False):
        print_model(str(name), rows)
    print("One process computes on padding too; wrapped there is none. Not counted as sent: the sum of gradients over")
    print("the ranks (sync_gradients), which data-parallel training has as well.\n")
    plot(table, png)
    print(f"numbers  {csv}\nplot     {png}\n")
    wrong = disagreements(table)
    print("\n".join(["These disagree:", *wrong]) if wrong else "OK: every loss and every gradient agrees.")
    return 1 if wrong else 0


def disagreements(table: pd.DataFrame) -> list[str]:
    wrong = []
    for row in table.to_dict("records"):
        where = f"  {row['model']}, step {row['step']}, rank {row['rank']}:"
        if not row["loss_error"] <= LOSS_TOLERANCE:  # so that NaN disagrees
            wrong.append(f"{where} loss {row['loss']:.7g}, on one process {row['loss_one_process']:.7g}")
        if row["step"] == 1 and not row["gradient_error_step_1"] <= GRADIENT_TOLERANCE:
            wrong.append(f"{where} worst relative gradient error {row['gradient_error_step_1']:.1e}")
    return wrong


# --- table -------------------------------------------------------------------------------------------------------


def print_model(name: str, rows: pd.DataFrame) -> None:
    """Losses by step, then what each rank holds beside what one process holds."""
    first_rank, first_step = rows[rows["rank"] == 0], rows[rows["step"] == 1]
    print(f"\n{name}\n  {'step':<6}{'loss, one process':>20}{'loss, wrapped':>16}{'relative difference':>22}")
    for row in first_rank.to_dict("records"):
        print(f"  {row['step']:<6}{row['loss_one_process']:>20.6f}{row['loss']:>16.6f}{row['loss_error']:>22.1e}")
    print(f"  worst relative error of a parameter's gradient at step 1: {rows['gradient_error_step_1'].max():.1e}\n")

    def line(label: str, alone: str, ranks: list[str]) -> None:
        print(f"  {label:<40}{alone:>12}" + "".join(f"{cell:>12}" for cell in ranks))

    line("", "one process", [f"rank {rank}" for rank in first_step["rank"]])
    for label, column in [
        ("tokens in the vision tower", "vision_tokens"),
        ("tokens in the decoder", "decoder_tokens"),
        ("query heads, where heads are exchanged", "query_heads"),
        ("key/value heads, decoder", "decoder_kv_heads"),
    ]:
        line(label, f"{first_step[f'{column}_one_process'].iloc[0]:,}", [f"{cell:,}" for cell in first_step[column]])
    saved, alone = first_step["saved_activation_bytes"], first_step["saved_activation_bytes_one_process"].iloc[0]
    line("activations saved for backward, MB", f"{alone / MB:.1f}", [f"{cell / MB:.1f}" for cell in saved])
    line("activations sent per step, MB", "0", [f"{cell / MB:.1f}" for cell in first_step["sent_bytes"]])
    print(flush=True)


# --- plot --------------------------------------------------------------------------------------------------------


def plot(table: pd.DataFrame, path: Path) -> None:
    plt.switch_backend("agg")
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    names = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(len(names), 3, figsize=(13, 3.6 * len(names)), squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        rows = table[table["model"] == name]
        plot_losses(row[0], name, rows)
        plot_bars(row[1], "tokens computed on", rows, {"vision_tokens": "vision tower", "decoder_tokens": "decoder"})
        plot_bars(row[2], "activations saved for backward, MB", rows, {"saved_activation_bytes": ""}, MB)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"The same training, on one process and shared by {table['ranks'].iloc[0]} ranks", fontsize=14)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_losses(axes: Axes, name: str, rows: pd.DataFrame) -> None:
    """Both loss curves, one on the other, and how far apart they are."""
    one = rows[rows["rank"] == 0]
    axes.plot(one["step"], one["loss_one_process"], color=GREY, linewidth=6, alpha=0.6, label="one process")
    axes.plot(one["step"], one["loss"], color=ORANGE, marker="o", label=f"wrapped, {one['ranks'].iloc[0]} ranks")
    axes.set(title=f"{name}: loss", xlabel="step", xticks=one["step"])
    axes.legend(frameon=False)
    loss, gradient = rows["loss_error"].max(), rows["gradient_error_step_1"].max()
    note = f"largest relative difference\nloss {loss:.0e}, gradient {gradient:.0e}"
    axes.text(0.03, 0.05, note, transform=axes.transAxes, color="#555555", fontsize=9)


def plot_bars(axes: Axes, title: str, rows: pd.DataFrame, columns: dict[str, str], unit: float = 1.0) -> None:
    """A group of bars for each column: one process, then every rank."""
    ranks = rows[rows["step"] == 1]
    width = 0.8 / (1 + len(ranks))
    colors = [GREY, *plt.get_cmap("Blues")([0.85 - 0.5 * i / len(ranks) for i in range(len(ranks))])]
    for group, column in enumerate(columns):
        values = [ranks[f"{column}_one_process"].iloc[0], *ranks[column]]
        for i, (value, color) in enumerate(zip(values, colors, strict=True)):
            label = "one process" if i == 0 else f"rank {i - 1}"
            x = group + (i - len(ranks) / 2) * width
            bar = axes.bar(x, value / unit, 0.92 * width, color=color, label=label if group == 0 else None)
            axes.bar_label(bar, labels=[f"{value / unit:,.0f}"], padding=2, fontsize=9)
    axes.set(title=title, xticks=range(len(columns)), xticklabels=columns.values(), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
