"""Plots and tables of what sweeps have measured: `triton-sp plot`, or `python -m perf.plot [--check]`.

The tables of the documents (perf/tables.py) are written anew from the CSVs; `--check` only says which do not agree with
them. PNGs go beside the CSVs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from perf.machine import ROOT
from perf.rows import read
from perf.tables import GIB, RESULTS, written

DOCUMENTS = [ROOT / "README.md", ROOT / "perf" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def plot_kernels(rows: pd.DataFrame, path: Path) -> None:
    """TFLOP/s of attention against the length of the stream, a panel for each head dim and direction, under the rate
    of a large matrix product in the same run."""
    import matplotlib.pyplot as plt

    roof = rows[(rows["stage"] == "rate") & rows["case"].str.startswith("product of") & (rows["provider"] == "torch")]
    rows = rows[(rows["stage"] == "attend") & (rows["kind"] == "measured") & (rows["status"] == "ok")]
    dims, directions = sorted(rows["dim"].unique()), list(rows["direction"].unique())
    figure, axes = plt.subplots(
        len(directions), len(dims), figsize=(4 * len(dims), 3.2 * len(directions)), squeeze=False
    )
    for line, direction in zip(axes, directions, strict=True):
        for axis, dim in zip(line, dims, strict=True):
            part = rows[(rows["dim"] == dim) & (rows["direction"] == direction)]
            for provider, points in part.groupby("provider"):
                best = points.groupby("tokens")["tflops"].max()
                wide = 2.5 if str(provider).startswith("triton_sp") else 1.0
                axis.plot(best.index, best.to_numpy(), marker=".", linewidth=wide, label=provider)
            if len(roof):
                axis.axhline(roof["tflops"].iloc[-1], color="0.6", linestyle="--", label="matrix product")
            axis.set(
                title=f"head dim {dim}, {direction}", xscale="log", xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None)
            )
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_model(rows: pd.DataFrame, path: Path) -> None:
    """Bytes sent, bytes kept and attention FLOPs of the rank that has most, against P."""
    import matplotlib.pyplot as plt

    columns = {"sent_bytes": "MB sent, forward", "saved_bytes": "MB kept for the backward", "flops": "attention GFLOP"}
    forward = rows[(rows["direction"] == "forward") & ~rows["status"].str.startswith("error")]
    cases = list(forward["case"].unique())
    figure, axes = plt.subplots(len(cases), len(columns), figsize=(11, 2.8 * len(cases)), squeeze=False)
    for line, case in zip(axes, cases, strict=True):
        for axis, (column, title) in zip(line, columns.items(), strict=True):
            for provider, part in forward[forward["case"] == case].groupby("provider"):
                most = part.groupby("ranks")[column].max() / (1e9 if column == "flops" else 1e6)
                style = "-" if provider == "triton_sp" else ":"  # lines that lie on one another are both seen
                axis.plot(most.index, most.to_numpy(), style, marker="o", label=provider)
            axis.set(title=f"{case}: {title}", xlabel="P", xticks=sorted(forward["ranks"].unique()), ylim=(0, None))
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_single_rank(rows: pd.DataFrame, path: Path) -> None:
    """What one rank holds of the shortest case, against P: parameters, what it keeps for the backward, and the rest."""
    import matplotlib.pyplot as plt

    rows = rows[rows["tokens"] == rows["tokens"].min()]
    parts = [(ranks, part.set_index("direction")["memory_bytes"] / GIB, part["saved_bytes"].max() / GIB)
             for ranks, part in rows.groupby("ranks")]  # fmt: skip
    ranks = [f"P = {ranks}" for ranks, *_ in parts]
    figure, axis = plt.subplots(figsize=(7, 2.6))
    left = [0.0] * len(parts)
    for label, color, sizes in (
        ("parameters", "0.7", [held["parameters"] for _, held, _ in parts]),
        ("kept for the backward", "tab:blue", [kept for *_, kept in parts]),
        ("the rest of the peak: gradients, work space", "tab:orange",
         [held["step"] - held["parameters"] - kept for _, held, kept in parts]),
    ):  # fmt: skip
        axis.barh(ranks, sizes, left=left, label=label, color=color)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="GiB on a rank", title=f"{rows['case'].iloc[0]}: {rows['tokens'].iloc[0]:,} visual tokens")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


PLOTS = {"kernels": plot_kernels, "model": plot_model, "single_rank": plot_single_rank}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; with --check the exit code is 1 if a document does not agree with the CSVs."""
    parser = argparse.ArgumentParser("perf.plot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say which documents are out of date")
    check = parser.parse_args(arguments).check
    stale = [path for path in DOCUMENTS if written(path.read_text()) != path.read_text()]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: its tables are not those of the CSVs; run: triton-sp plot")
        return int(bool(stale))
    for path in stale:
        path.write_text(written(path.read_text()))
        print(path)
    for name, plot in PLOTS.items():
        for csv in RESULTS.glob(f"*/{name}.csv"):
            plot(read(csv), csv.with_suffix(".png"))
            print(csv.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
