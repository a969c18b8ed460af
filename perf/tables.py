"""The tables of measurements in the documents, made of the CSVs.

Each stands between `<!-- table: name -->` and `<!-- end -->`; `python -m perf.plot` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pandas as pd

from perf.machine import ROOT
from perf.rows import read
from tools.marked import filled

RESULTS = ROOT / "perf" / "results"
MARKER = re.compile(r"<!-- table: (\w+) -->\n")
GIB = 2**30


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _busiest(rows: pd.DataFrame, direction: str) -> pd.Series:
    """The row of the rank that has most of everything."""
    part = rows[rows["direction"] == direction]
    row = part.iloc[0].copy()
    for name in ("sent_bytes", "saved_bytes", "flops", "median_ms", "p20_ms", "p80_ms", "error"):
        row[name] = part[name].max()
    if (part["status"] != "ok").any():
        row["status"] = part["status"][part["status"] != "ok"].iloc[0]
    return row


def _runs(rows: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """(case, P, provider) and the rows of each run, in the order of the file, but case by case."""
    order = {case: i for i, case in enumerate(rows["case"].unique())}
    groups = rows.groupby(["case", "ranks", "provider"], sort=False)
    found = sorted(groups, key=lambda group: (order[group[0][0]], group[0][1]))
    return [([case, str(ranks), provider], part) for (case, ranks, provider), part in found]


def _time(row: pd.Series) -> str:
    if row["status"] != "ok":
        return "-"
    return f"{row['median_ms'] / 1e3:.2f} ({row['p20_ms'] / 1e3:.2f}-{row['p80_ms'] / 1e3:.2f})"


def model_table(rows: pd.DataFrame) -> str:
    """Whole models: of each run, the rank that has most."""
    header = ["model", "P", "engine", "result", "collectives a layer, forward", "MB sent, forward", "backward",
              "attention GFLOP, forward", "MB saved", "CPU s a step (p20-p80)", "error of loss, gradients"]  # fmt: skip
    lines = []
    for name, part in _runs(rows[(rows["kind"] == "measured") & rows["ratio"].isna()]):
        forward = _busiest(part, "forward")
        if forward["status"].startswith("error"):
            lines.append([*name, forward["status"], *[""] * 7])
            continue
        backward, step = _busiest(part, "backward"), _busiest(part, "step")
        sizes = [f"{x['sent_bytes'] / 1e6:.1f}" for x in (forward, backward)]
        work = [f"{forward['flops'] / 1e9:.2f}", f"{forward['saved_bytes'] / 1e6:.1f}"]
        errors = f"{forward['error']:.0e}, {backward['error']:.0e}"
        lines.append([*name, step["status"], forward["layer_collectives"], *sizes, *work, _time(step), errors])
    return markdown(header, lines)


def overhead_table(rows: pd.DataFrame) -> str:
    """What wrap costs on one rank."""
    lines = []
    for _, r in rows[rows["ratio"].notna()].sort_values("tokens", kind="stable").iterrows():
        more = 1 / r["ratio"] - 1
        numbers = [f"{r['median_ms']:.1f}", f"{more * r['median_ms']:+.2f}", f"{100 * more:+.1f} %"]
        lines.append([r["case"], str(r["tokens"]), *numbers])
    header = ["model, P = 1", "tokens", "CPU ms a step, wrapped", "more than unwrapped, ms", "of a step"]
    return markdown(header, lines)


def exchange_table(rows: pd.DataFrame) -> str:
    """One attention layer: of each run, the rank that has most."""
    header = ["layer", "P", "provider", "result", "collectives, forward", "backward", "MB sent, forward", "backward",
              "attention GFLOP, forward", "CPU s (p20-p80)"]  # fmt: skip
    lines = []
    for name, part in _runs(rows):
        forward = _busiest(part, "forward")
        if forward["status"].startswith("error"):
            lines.append([*name, forward["status"], *[""] * 6])
            continue
        backward, both = _busiest(part, "backward"), _busiest(part, "both")
        counts = [forward["collectives"], backward["collectives"]]
        sizes = [f"{x['sent_bytes'] / 1e6:.1f}" for x in (forward, backward)]
        lines.append([*name, both["status"], *counts, *sizes, f"{forward['flops'] / 1e9:.2f}", _time(both)])
    return markdown(header, lines)


def fuse_table(rows: pd.DataFrame) -> str:
    """Fusion: of each method, the rank that holds most."""
    lines = []
    for (ranks, kind, way), part in rows.groupby(["ranks", "kind", "provider"], sort=False):
        most = part.groupby("direction")[["sent_bytes", "largest_bytes", "memory_bytes"]].max() / 1e6
        numbers = [most.loc["forward", "sent_bytes"], most.loc["backward", "sent_bytes"]]
        numbers += [most.loc["forward", "largest_bytes"], most.loc["forward", "memory_bytes"]]
        lines.append([str(ranks), kind, way, *(f"{x:.2f}" for x in numbers)])
    lines.sort(key=lambda line: (int(line[0]), line[2] != "triton_sp", line[1]))
    return markdown(["P", "kind", "way", "MB sent, forward", "backward", "largest tensor, MB", "peak, MB"], lines)


def agree_table(rows: pd.DataFrame) -> str:
    """What checks cost: of each number, the rank that has most of it."""
    rows = rows[rows["case"] == "LLaVA-1.5-7B, narrow"]
    most = rows.groupby(["ranks", "provider", "direction", "tokens"])[["median_ms", "sent_bytes"]].max()
    before, lines = ("check before the forward", "check before the backward"), []
    for ranks, check in rows[["ranks", "provider"]].drop_duplicates().itertuples(index=False):
        found = most.loc[ranks, check]
        if check == 'check="off"':
            host = found["median_ms"]["step, cpu"].iloc[0]
            continue
        backward, wall = (found["median_ms"][f"{before[1]}, {clock}"].iloc[0] for clock in ("cpu", "wall"))
        sent = found["sent_bytes"][f"{before[0]}, cpu"].iloc[0] + found["sent_bytes"][f"{before[1]}, cpu"].iloc[0]
        for tokens, forward in found["median_ms"][f"{before[0]}, cpu"].items():
            waited = found["median_ms"][f"{before[0]}, wall", tokens] + wall
            numbers = [f"{forward:.1f} + {backward:.1f}", f"{(forward + backward) / host:.1%} of {host:.0f}"]
            lines.append([f"`{check}`", str(ranks), f"{tokens:,}", f"{sent:.0f}", *numbers, f"{waited:.1f}"])
    header = [
        "setting",
        "P",
        "tokens of the batch",
        "bytes a rank sends",
        "CPU ms, forward + backward",
        "of a step's CPU ms",
    ]
    return markdown([*header, "ms by the wall clock"], lines)


def proof_table(rows: pd.DataFrame) -> str:
    """What a verified layer adds to a step, on the rank that needs most."""
    steps = rows[rows["case"] == "Llama LLM"].groupby(["tokens", "provider", "direction"])["median_ms"].max()
    lines = []
    for tokens in steps.index.unique("tokens"):
        for clock in ("cpu", "wall"):
            without, verified = (steps[tokens, f"verify={n}", f"step, {clock}"] for n in (0, 1))
            lines.append([f"{tokens:,}", clock, f"{without:.0f}", f"{verified:.0f}", f"{verified - without:.0f}"])
    return markdown(["tokens", "clock", "ms of a step", "with a verified layer", "the layer"], lines)


def scale_table(rows: pd.DataFrame) -> str:
    """Bytes and times by formula."""
    lines = []
    for (case, ranks, way), part in rows.groupby(["case", "ranks", "provider"], sort=False):
        values = part.set_index("direction")
        if ranks <= 8 and way != "one level":
            continue  # one node: there are no two levels
        sizes = [f"{values.loc[d, 'sent_bytes'] / 1e6:.1f}" for d in ("inside nodes", "between nodes")]
        times = [f"{values.loc[d, 'median_ms']:.2f}" for d in ("send", "attend")]
        lines.append([case, str(ranks), way, *sizes, *times])
    return markdown(["layer", "GPUs", "way", "MB in node", "MB between", "send ms", "attend ms"], lines)


def single_rank_table(rows: pd.DataFrame) -> str:
    """What one rank of an 8B model holds."""
    lines = []
    for (case, tokens, ranks), part in rows.groupby(["case", "tokens", "ranks"]):
        values = part.set_index("direction")["memory_bytes"] / GIB
        if "parameters" in values and part["status"].eq("ok").all():
            kept = part["saved_bytes"].max() / GIB
            numbers = [values["parameters"], values["inputs"], kept, values["step"]]
            lines.append([case, f"{tokens:,}", str(ranks), *(f"{x:.1f}" for x in numbers)])
    header = ["model", "visual tokens", "P", "parameters, GiB", "inputs", "kept for the backward", "peak of the step"]
    return markdown(header, lines)


def host_table(rows: pd.DataFrame) -> str:
    """What a layer, or a whole forward, costs the host, and what each stage is of it."""
    lines = []
    for (stage, case, ranks), part in rows[rows["stage"].isin(["layer", "model"])].groupby(
        ["stage", "case", "ranks"], sort=False
    ):
        values = 1e3 * part.set_index(["provider", "direction"])["p20_ms"]
        both = "forward and backward"
        numbers = [
            f"{values[provider, direction]:,.0f}"
            for direction in ("forward", both)
            for provider in ("triton_sp", "SDPA, unwrapped")
        ]
        own = rows[(rows["case"] == case) & (rows["ranks"] == ranks)].set_index(["stage", "direction"])["p20_ms"]
        ways = ("forward", "backward")
        parts = [[own.get((name, way)) for name in ("pack", "exchange", "attend", "unpack")] for way in ways]
        stages = [" + ".join(f"{1e3 * x:.0f}" for x in part if x is not None) for part in parts]
        name = case if stage == "layer" else f"{case}, model of {part['layers'].max()} layers"
        lines.append([name, str(ranks), *numbers, *(stages if stage == "layer" else ["", ""])])
    titles = ["us forward", "SDPA", "us forward and backward", "SDPA"]
    header = ["layer", "P", *titles, "pack + exchange + attend + unpack", "backward"]
    return markdown(header, lines)


def rotation_table(rows: pd.DataFrame) -> str:
    """What a model's own code does to q and k before attention."""
    lines = []
    for (case, stage), part in rows[rows["provider"] == "transformers"].groupby(["case", "stage"], sort=False):
        values = 1e3 * part.set_index("direction")["p20_ms"]
        lines.append([case.split(",")[0], stage, *(f"{values[d]:.0f}" for d in ("forward", "forward and backward"))])
    return markdown(["layer", "of q and k", "us forward", "us forward and backward"], lines)


def host_before_table(rows: pd.DataFrame) -> str:
    """The layer as one operator beside the layer as it was."""
    lines = []
    for case, part in rows.groupby("case", sort=False):
        values = 1e3 * part.set_index(["direction", "provider"])["median_ms"]
        for direction in ("forward", "forward and backward"):
            own, base = values[direction, "triton_sp"], values[direction, "SDPA, unwrapped"]
            before = values[direction, "triton_sp at 1154d29"]
            numbers = [f"{before:,.0f}", f"{own:,.0f}", f"{100 * own / before:.0f} %", f"{own - base:+.0f}"]
            lines.append([str(case), direction, *numbers])
    return markdown(["layer, P = 8", "direction", "before, us", "now, us", "of before", "over SDPA, us"], lines)


_PLANNING = ("lay out", "lay out again", "choose", "choose again", "route", "agree")


def plan_table(rows: pd.DataFrame) -> str:
    """What planning a batch costs the host."""
    lines = []
    for (case, _), part in rows.groupby(["case", "ranks"], sort=False):
        values = part.set_index("provider")["p20_ms"]
        first = part.iloc[0]
        numbers = [f"{values[name]:.1f}" if name in values else "" for name in _PLANNING]
        lines.append([str(case), f"{first['tokens']:,}", f"{first['segments']:,}", str(first["ranks"]), *numbers])
    return markdown(["batch", "tokens", "segments", "P", *(f"{name} ms" for name in _PLANNING)], lines)


def kernels_table(rows: pd.DataFrame) -> str:
    """Speed beside the best peer of the same run, of this library's rows."""
    found = rows[rows["provider"].str.startswith("triton_sp") & (rows["kind"] == "measured")]
    lines = []
    for _, r in found.iterrows():
        rate = f"{r['tflops']:.0f} TFLOP/s" if r["tflops"] > 0 else f"{r['gbps']:.0f} GB/s"
        result = r["status"] if r["status"] != "ok" else f"{rate}, {100 * r['share']:.0f} %"
        ratio = "" if pd.isna(r["ratio"]) else f"{r['ratio']:.2f}"
        lines.append([r["stage"], r["case"], f"{r['tokens']:,}", r["provider"], r["direction"], result, ratio])
    header = ["stage", "case", "tokens", "provider", "direction", "rate, share of the limit", "best peer's time / ours"]
    return markdown(header, lines)


def _cpu(name: str) -> Callable[[], pd.DataFrame]:
    return lambda: read(RESULTS / "cpu" / f"{name}.csv")


TABLES: dict[str, tuple[Callable[[pd.DataFrame], str], Callable[[], pd.DataFrame]]] = {
    "model": (model_table, _cpu("model")),
    "overhead": (overhead_table, _cpu("model")),
    "exchange": (exchange_table, _cpu("exchange")),
    "fuse": (fuse_table, _cpu("fuse")),
    "agree": (agree_table, _cpu("agree")),
    "proof": (proof_table, _cpu("agree")),
    "scale": (scale_table, _cpu("scale")),
    "single_rank": (single_rank_table, _cpu("single_rank")),
    "host": (host_table, _cpu("host")),
    "rotation": (rotation_table, _cpu("host")),
    "host_before": (host_before_table, _cpu("host_before")),
    "plan": (plan_table, _cpu("plan")),
}
for _folder in sorted(RESULTS.glob("*/kernels.csv")):  # a table for each GPU that there are rows of
    _name = "kernels_" + re.sub(r"\W", "_", _folder.parent.name)
    TABLES[_name] = (kernels_table, lambda path=_folder: read(path))


def written(text: str) -> str:
    """A document with its tables as the CSVs have them.

    Raises:
        ValueError: a marker names no table.
    """
    for name in MARKER.findall(text):
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        make, rows = TABLES[name]
        text = filled(text, f"table: {name}", make(rows()).split("\n"))
    return text
