"""What the backward for Hopper compiles to: `python tests/kernels/gluon_table.py` writes the table, with a Triton whose
Gluon the kernel is for (3.6 to 3.8)."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import compile_table as ct
import torch
import triton

from triton_sp.kernels.hopper import backward
from triton_sp.kernels.mask import Mask

TABLE = Path(__file__).parents[1] / "data" / "gluon_backward_compiled.csv"


def row(dim: int) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions at a head dim."""
    q, k = torch.zeros(128, 4, dim, dtype=torch.bfloat16), torch.zeros(128, 2, dim, dtype=torch.bfloat16)
    mask, compiled = Mask(torch.tensor([0, 100, 128], dtype=torch.int32), causal=True), dict[str, Any]()
    with ct.compiling_for("sm_90", compiled):
        backward.backward(q, None, q, k, k, q, torch.zeros(4, 128), mask, softmax_scale=dim**-0.5)
    kernel = compiled["gluon_backward"]
    ptx = kernel.asm["ptx"]
    shapes = Counter(re.findall(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    # Each instruction is one warpgroup's; there are two.
    issued = 2 * sum(n * math.prod(map(int, re.findall(r"\d+", shape))) for shape, n in shapes.items())
    return {
        "triton": triton.__version__, "target": "sm_90", "dim": dim, "rows": backward.ROWS, "keys": backward.KEYS,
        "warps": backward.WARPS, "stages": backward.STAGES[dim], **ct.assemble(ptx, "sm_90"),
        "shared_bytes": kernel.metadata.shared,
        "matrix": " ".join(f"{n}*{shape}" for shape, n in sorted(shapes.items())),
        "issued_over_useful": round(issued / (5 * backward.ROWS * backward.KEYS * dim), 3),
        "mma_sync": sum(n for shape, n in shapes.items() if not shape.startswith("m64")),
        "atomics": len(re.findall(r"(?:red|atom)\.global\S*add\S*f32", ptx)),
    }  # fmt: skip


def main() -> None:
    """Write the rows of this Triton, and keep those of others."""
    others = list(csv.DictReader(TABLE.open(newline=""))) if TABLE.exists() else []
    rows = [x for x in others if x["triton"] != triton.__version__] + [row(dim) for dim in backward.STAGES]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
