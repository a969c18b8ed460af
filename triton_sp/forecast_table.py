"""What `triton-sp plan` prints: forecasts as a table for people, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from triton_sp.forecast import Forecast


def as_table(rows: Sequence[Forecast], gpu_memory: float | None = None) -> str:
    """Lines for people. `gpu_memory`: GB of a GPU, of which the rows then say whether the step fits."""
    names = [field.name for field in fields(Forecast) if field.name not in ("ranks", "tokens", "own_tokens", "plans")]
    heads = ["P", "tokens", "of a rank", *(f"{name.replace('_', ' ')} GB" for name in names), "plans"]
    heads += ["fits"] if gpu_memory else []
    cells = [heads]
    for row in rows:
        line = [f"{row.ranks}", f"{row.tokens:,}", f"{row.own_tokens:,}"]
        line += [f"{getattr(row, name) / 1e9:.3g}" for name in names]
        line.append(", ".join(f"{name.split('.')[-2]} {plan}" for name, plan in row.plans.items()))
        cells.append(line + (["yes" if row.total <= gpu_memory * 1e9 else "no"] if gpu_memory else []))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in cells)


def as_json(rows: Sequence[Forecast]) -> str:
    """For programs: a list of objects with the fields of `Forecast`."""
    return json.dumps([asdict(row) for row in rows], indent=1)
