"""What pack, unpack and splice compile to, and the bytes that a launch moves: tests/data/moves_compiled.csv.

A launch of a rank of 8, of a stream of 65,536 tokens: 16 heads of 72 as Qwen3-VL's tower has them, 32 and 8 of 128 as
its decoder. Every number is read once and written once; a rotated one is read once more for the other half of its
head, and where the adjoint has normalised ones before it, they are read, and sums for the weights are written. `lanes`
is how many the programs have places for, over that.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from compiling import GRIDS, TARGETS, Table, accesses, compiling_for, measure

from triton_sp.kernels import boxes, pack, splice
from triton_sp.kernels.mask import Norm, Rotation

FIELDS = [
    "triton", "target", "kernel", "dim", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "accesses", "bytes",
    "lanes",
]  # fmt: skip
TABLE = Table(Path(__file__).parents[1] / "data" / "moves_compiled.csv", FIELDS, 4)
RANKS, TOKENS, WIDTH = 8, 8192, 4096
HEADS = {72: (16, 16), 128: (32, 8)}


def rows_for(target: str, dim: int) -> list[dict[str, Any]]:
    """A row for each kernel."""
    heads, kv_heads = HEADS[dim]
    with torch.device("meta"):  # addresses are all multiples of 16, and nothing is there
        states = torch.empty(TOKENS, heads + 2 * kv_heads, dim, dtype=torch.bfloat16)
        xs = list(states.split((heads, kv_heads, kv_heads), 1))
        table = torch.empty(3 * RANKS, 7, dtype=torch.int32)
        text = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)
        index = torch.empty(TOKENS, dtype=torch.int64)
        rotation = Rotation(*torch.empty(2, TOKENS, dim, dtype=torch.bfloat16))
        weight = torch.empty(dim, dtype=torch.bfloat16, requires_grad=True)
    compiled: dict[str, Any] = {}
    for how, norm in {"rotated": None, "normalised": Norm((weight, weight), 1e-6)}.items():
        found: dict[str, Any] = {}
        with compiling_for(target, found):
            asked = rotation._replace(norm=norm)
            pack.unpack(pack.pack(xs, RANKS, asked), xs, RANKS, asked.of(xs[0], xs[1], weight, weight).adjoint)
        compiled |= {f"{name}_{how}": kernel for name, kernel in found.items()}
    with compiling_for(target, compiled):
        flat = pack.pack(xs, RANKS)
        pack.unpack(flat, xs, RANKS)
        boxes.pack(xs[:1], table, flat.shape[0])
        boxes.unpack(flat, table, xs[:1])
        splice.splice(text, text, index)
    # q alone travels by boxes here: of three launches, one.
    numbers = {"pack_heads": flat.numel(), "splice_rows": text.numel()}
    numbers |= {"unpack_heads": numbers["pack_heads"], "pack_boxes": xs[0].numel(), "unpack_boxes": xs[0].numel()}
    tables = dict.fromkeys((name for name in compiled if name[-2:] == "ed"), 2 * TOKENS * dim)
    numbers |= dict.fromkeys(tables, flat.numel())
    tiles = {"pack_heads": pack.UNITS * 8, "unpack_heads": pack.UNITS * 8, "splice_rows": splice.ROWS * splice.COLUMNS}
    tiles |= dict.fromkeys(tables, pack.ROTATED * math.gcd(8, dim // 2))  # half of a head is whole units
    # The rows before the norm, and in fp32 the sums of each tile, written and read.
    sums = sum(x.numel() for x in xs[:2]) // tiles["unpack_heads_normalised"] * dim
    more = {"unpack_heads_normalised": 2 * sum(x.numel() for x in xs[:2]) + 2 * 4 * sums}
    rows = []
    for kernel, binary in compiled.items():
        of_it = measure(binary, target)
        lanes = math.prod(GRIDS[binary.hash]) * tiles[kernel] / numbers[kernel] if kernel in tiles else ""
        rows.append({
            "triton": triton.__version__, "target": target, "kernel": kernel, "dim": "" if "splice" in kernel else dim,
            **{name: of_it[name] for name in FIELDS[4:8]}, "accesses": accesses(binary, target),
            "bytes": 2 * 2 * numbers[kernel] + 2 * tables.get(kernel, 0) + more.get(kernel, 0),
            "lanes": lanes and round(lanes, 3),
        })  # fmt: skip
    return rows


def main(arguments: list[str]) -> None:
    """Write the rows of this Triton, and keep those of others."""
    for target in [x for x in arguments if x in TARGETS] or TARGETS:
        for dim in HEADS:
            TABLE.put(rows_for(target, dim))


if __name__ == "__main__":
    main(sys.argv[1:])
