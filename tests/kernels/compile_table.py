"""What the attend kernels compile to, without a GPU: registers, spills, shared memory and matrix instructions.

`make compile-table` writes the table to tests/data/attend_compiled.csv; tests/kernels/test_compile.py holds the kernels
to it. It is an hour of CPU: rows are written as they come, and what is there with the launch of today is not compiled
again. ARGS="sm_90 72" takes a part of it, ARGS=--again all anew, after a change of the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from compiling import TARGETS, Table, compiling_for, measure

from triton_sp.kernels import attend, attend_backward, launch
from triton_sp.kernels.hopper import attend as hopper_attend
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.mask import Mask

# Matrix products over the head dim of q and k, and over that of v, for each (row, key) pair.
PRODUCTS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2), "dkv_dk": (2, 1), "dkv_dv": (1, 1)}
FIELDS = [
    "triton", "target", "tier", "dim", "v_dim", "dtype", "variant", "kernel", "rows", "keys", "warps", "stages",
    "maxnreg", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "matrix", "issued_over_useful", "loads",
    "mma_sync", "warnings",
]  # fmt: skip
TABLE = Table(Path(__file__).parents[1] / "data" / "attend_compiled.csv", FIELDS, 8)


class Case(NamedTuple):
    """One call, forward and backward: head dims of q and k, and of v. Variants: learned "sinks", "ranges" of keys,
    "tiles", where a stream's layers share a table of its tiles, and "windows", where no segment is long."""

    dim: int
    v_dim: int
    variant: str = ""
    dtype: torch.dtype = torch.bfloat16

    @property
    def longest(self) -> int | None:
        return launch.WINDOW if self.variant == "windows" else None

    @property
    def key(self) -> tuple[str, ...]:
        return str(self.dim), str(self.v_dim), str(self.dtype).removeprefix("torch."), self.variant


CASES = [
    *(Case(dim, dim) for dim in launch.DIMS),
    Case(192, 128),
    *(Case(dim, dim, "sinks") for dim in (64, 128)),
    *(Case(dim, dim, variant) for dim in (72, 128, 256) for variant in ("ranges", "tiles")),
    *(Case(dim, dim, "windows") for dim in (64, 72, 80, 128)),
]


def compile_attend(target: str, case: Case, heads: int = 3) -> dict[str, Any]:
    """The kernels {"forward", "dq", "dkv"} as the launchers compile them for packed tensors with an odd head count."""
    q, v = (torch.zeros(64, heads, size, dtype=case.dtype) for size in (case.dim, case.v_dim))
    mask = Mask(torch.tensor([0, 40, 64], dtype=torch.int32), kept={} if case.variant == "tiles" else None)
    if case.variant == "ranges":
        mask = mask._replace(key_ranges=torch.tensor([[0] * 64, [64] * 64], dtype=torch.int32))
    if case.longest is not None:
        mask = mask._replace(max_seqlens=(case.longest, case.longest))
    sinks = torch.zeros(heads, dtype=case.dtype) if case.variant == "sinks" else None
    compiled: dict[str, Any] = {}
    with compiling_for(target, compiled):
        out, lse = attend.forward(q, q, v, mask, softmax_scale=1.0, sinks=sinks)
        attend_backward.backward(out, None, q, q, v, out, lse, mask, softmax_scale=1.0, sinks=sinks)
    if case.variant == "sinks":
        compiled = {name: kernel for name, kernel in compiled.items() if not name.startswith("dkv")}  # knows of none
    return compiled


def compile_gluon(dim: int, dtype: torch.dtype = torch.bfloat16, heads: int = 3, wait: bool = False) -> dict[str, Any]:
    """The Gluon kernel {"gluon"} as its launcher compiles it for sm_90."""
    q = torch.zeros(64, heads, dim, dtype=dtype)
    mask = Mask(torch.tensor([0, 40, 64], dtype=torch.int32))
    compiled: dict[str, Any] = {}
    with compiling_for("sm_90", compiled):
        hopper_attend.forward(q, q, q, mask, softmax_scale=1.0, wait=wait)
    return compiled


def chosen(target: str, kernel: str, case: Case) -> dict[str, Any]:
    """The launch of a kernel, as the table names it."""
    with compiling_for(target, {}):
        choice = launch.find_launch(kernel.split("_")[0], case.dim, case.v_dim, case.dtype, case.longest)
    options = choice.options
    return {
        "rows": choice.rows, "keys": choice.keys, "warps": options["num_warps"], "stages": options["num_stages"],
        "maxnreg": options.get("maxnreg", ""),
    }  # fmt: skip


def rows_for(target: str, case: Case) -> Iterator[dict[str, Any]]:
    """The rows of a case, one for each kernel."""
    names = dict(zip(FIELDS[3:7], case.key, strict=True)) | {"triton": triton.__version__, "target": target}
    for kernel, compiled in compile_attend(target, case).items():
        found, launched = measure(compiled, target), chosen(target, kernel, case)
        useful = sum(n * dim for n, dim in zip(PRODUCTS[kernel], (case.dim, case.v_dim), strict=True))
        issued = found.pop("products") * launched["warps"]
        ratio = round(issued / (launched["rows"] * launched["keys"] * useful), 3)
        yield names | {"tier": "tl", "kernel": kernel} | launched | found | {"issued_over_useful": ratio}
    plain = target == "sm_90" and not case.variant and case.dim == case.v_dim and case.dim in hopper_attend.DIMS
    if plain and not gate.missing_api():
        yield names | describe_gluon(case)


def describe_gluon(case: Case) -> dict[str, Any]:
    """The row of the Gluon tier. Registers are those at the start: the warps that multiply take 232, of the others'."""
    found = measure(compile_gluon(case.dim, case.dtype)["gluon"], "sm_90")
    # Each product is there twice, in the loop and for its first or last block; groups of 4 warps run them, 2 of them.
    ratio = 4 * found.pop("products") / (4 * hopper_attend.ROWS * hopper_attend.KEYS * case.dim)
    launched = {"rows": hopper_attend.ROWS, "keys": hopper_attend.KEYS, "warps": 12, "stages": 2}
    return {"tier": "gluon", "kernel": "forward", "issued_over_useful": round(ratio, 3)} | launched | found


def is_there(target: str, case: Case) -> bool:
    """Whether the table has a case as it would be launched today."""
    wanted = (triton.__version__, target, "tl", *case.key)
    found = [row for key, row in TABLE.read().items() if key[:7] == wanted]
    read = all(row["loads"] for row in found)  # rows of an earlier form of the table do not say
    return (
        bool(found)
        and read
        and all(row[name] == str(value) for row in found for name, value in chosen(target, row["kernel"], case).items())
    )


def main(arguments: list[str]) -> None:
    """Write the rows of this Triton that are not there, and keep all others."""
    dims = {int(x) for x in arguments if x.isdigit()}
    for target in [x for x in arguments if x in TARGETS] or TARGETS:
        for case in CASES:
            if (dims and case.dim not in dims) or ("--again" not in arguments and is_there(target, case)):
                continue
            rows = list(rows_for(target, case))
            for row in rows:
                print(*row.values(), flush=True)
            TABLE.put(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
