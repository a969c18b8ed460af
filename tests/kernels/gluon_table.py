"""What the backward for Hopper compiles to: `python tests/kernels/gluon_table.py` writes the table, with a Triton whose
Gluon the kernel is for (3.6 to 3.8)."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import torch
import triton
from compiling import compiling_for, measure

from triton_sp.kernels.hopper import backward
from triton_sp.kernels.mask import Mask

TABLE = Path(__file__).parents[1] / "data" / "gluon_backward_compiled.csv"
MEASURES = ("registers", "spill_bytes", "stack_bytes", "warnings", "shared_bytes", "matrix")


def row(dim: int) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions at a head dim."""
    q, k = torch.zeros(128, 4, dim, dtype=torch.bfloat16), torch.zeros(128, 2, dim, dtype=torch.bfloat16)
    mask, compiled = Mask(torch.tensor([0, 100, 128], dtype=torch.int32), causal=True), dict[str, Any]()
    with compiling_for("sm_90", compiled):
        backward.backward(q, None, q, k, k, q, torch.zeros(4, 128), mask, softmax_scale=dim**-0.5)
    kernel = compiled["gluon_backward"]
    found = measure(kernel, "sm_90")
    # Each instruction is one warpgroup's, of four warps; there are two.
    issued = found.pop("products") * backward.WARPS
    return {
        "triton": triton.__version__, "target": "sm_90", "dim": dim, "rows": backward.ROWS, "keys": backward.KEYS,
        "warps": backward.WARPS, "stages": backward.STAGES[dim], **{name: found[name] for name in MEASURES},
        "issued_over_useful": round(issued / (5 * backward.ROWS * backward.KEYS * dim), 3),
        "mma_sync": found["mma_sync"],
        "atomics": len(re.findall(r"(?:red|atom)\.global\S*add\S*f32", kernel.asm["ptx"])),
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
