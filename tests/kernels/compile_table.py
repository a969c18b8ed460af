"""What the attend kernels compile to, without a GPU: registers, spills, shared memory and matrix instructions.

The ordinary host launchers run on CPU tensors with a stand-in driver that only says which chip it is, and every launch
compiles without running. So the arguments are specialised exactly as on that chip. `make compile-table` writes the
whole table to tests/data/attend_compiled.csv; tests/kernels/test_compile.py holds the kernels to it.
"""

import csv
import math
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from triton_sp.kernels import attend, attend_backward, launch
from triton_sp.kernels.hopper import attend as hopper_attend
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.mask import Mask

TABLE = pathlib.Path(__file__).parents[1] / "data" / "attend_compiled.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may use
# Matrix products over the head dim of q and k, and over that of v, for each (row, key) pair.
PRODUCTS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2), "dkv_dk": (2, 1), "dkv_dv": (1, 1)}
DIMS = [(dim, dim) for dim in launch.DIMS] + [(192, 128)]  # of q and k, and of v
FIELDS = [
    "triton", "target", "kernel", "tier", "dim", "v_dim", "dtype", "rows", "keys", "warps", "stages", "registers",
    "spill_bytes", "stack_bytes", "shared_bytes", "matrix", "issued_over_useful", "narrow_loads",
    "mma_sync", "warnings",
]  # fmt: skip


class StandInDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels are cached by device: one cache for each chip

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str, compiled: dict):
    """Inside, launching a kernel compiles it for `target` and puts it into `compiled` under its name."""
    real = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        name = self.__name__.removeprefix("attend_")
        if name == "gluon" and options["WAIT"]:
            name = "gluon_wait"
        if options.get("DK") != options.get("DV"):  # one of the two launches at D = 256
            name += "_dk" if options["DK"] else "_dv"
        compiled[name] = kernel.result() if hasattr(kernel, "result") else kernel

    driver, JITFunction.run = triton.runtime.driver._active, compile_only
    triton.runtime.driver.set_active(StandInDriver(TARGETS[target]))
    try:
        yield
    finally:
        JITFunction.run = real
        triton.runtime.driver._active = driver


def compile_attend(target: str, dim: int, v_dim: int, dtype: torch.dtype = torch.bfloat16, heads: int = 3) -> dict:
    """The kernels {"forward", "dq", "dkv"} as the launchers compile them for packed tensors with an odd head count."""
    q, v = (torch.zeros(64, heads, size, dtype=dtype) for size in (dim, v_dim))
    mask = Mask(torch.tensor([0, 40, 64], dtype=torch.int32))
    compiled = {}
    with compiling_for(target, compiled):
        out, lse = attend.forward(q, q, v, mask, softmax_scale=dim**-0.5)
        attend_backward.backward(out, None, q, q, v, out, lse, mask, softmax_scale=dim**-0.5)
    return compiled


def compile_gluon(dim: int, dtype: torch.dtype = torch.bfloat16, heads: int = 3, wait: bool = False) -> dict:
    """The Gluon kernel {"gluon"} as its launcher compiles it for sm_90."""
    q = torch.zeros(64, heads, dim, dtype=dtype)
    mask = Mask(torch.tensor([0, 40, 64], dtype=torch.int32))
    compiled = {}
    with compiling_for("sm_90", compiled):
        hopper_attend.forward(q, q, q, mask, softmax_scale=dim**-0.5, wait=wait)
    return compiled


def describe_gluon(dim: int, dtype: torch.dtype, compiled) -> dict:
    """One row of the table. Registers are those at the start: the warps that multiply take 232, the others give up."""
    ptx = compiled.asm["ptx"]
    shapes = Counter(re.findall(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    row = dict.fromkeys(FIELDS, "") | {"triton": triton.__version__, "target": "sm_90", "kernel": "forward"}
    row |= {"tier": "gluon", "dim": dim, "v_dim": dim, "dtype": str(dtype).removeprefix("torch.")}
    row |= {
        "rows": hopper_attend.ROWS,
        "keys": hopper_attend.KEYS,
        "warps": 12,
        "stages": 2,
        "shared_bytes": compiled.metadata.shared,
    }
    row |= assemble(ptx, "sm_90")
    row["mma_sync"] = sum(n for shape, n in shapes.items() if not shape.startswith("m64"))
    row["narrow_loads"] = len(re.findall(r"ld\.global(?:\.\w+)*?\.[bu]16", ptx))
    issued = sum(n * math.prod(map(int, re.findall(r"\d+", shape))) for shape, n in shapes.items())
    # Each product is there twice, in the loop and for its first or last block.
    row["issued_over_useful"] = round(issued / (4 * hopper_attend.ROWS * hopper_attend.KEYS * dim), 3)
    row["matrix"] = " ".join(f"{n}*{shape}" for shape, n in sorted(shapes.items()))
    return row


def assemble(ptx: str, target: str) -> dict:
    """Registers, spills, stack and warnings as ptxas reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        chip = target if target == "sm_80" else target + "a"
        tools = triton.knobs.nvidia
        # Triton takes its newer assembler from sm_100 on, 3.9 from sm_90 on.
        newer = target == "sm_100" or (target == "sm_90" and triton.__version__ >= "3.9")
        command = [
            (tools.ptxas_blackwell if newer else tools.ptxas).path,
            "-v",
            f"--gpu-name={chip}",
            source.name,
            "-o",
            "/dev/null",
        ]
        log = subprocess.run(command, capture_output=True, text=True).stderr
    assert "Used" in log, log
    stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes spill st.*?(\d+) bytes", log).groups())
    warnings = " ".join(sorted(set(re.findall(r"C75\d\d", log))))
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return {"registers": registers, "spill_bytes": stores + loads, "stack_bytes": stack, "warnings": warnings}


def assert_no_spill(compiled, target: str, registers: int = 255) -> None:
    """No register spilled, no stack, and at most so many registers (on NVIDIA's chips)."""
    if target == "gfx942":
        assert re.search(r"\.vgpr_spill_count:\s+0\b", compiled.asm["amdgcn"])
    else:
        report = assemble(compiled.asm["ptx"], target)
        assert report["spill_bytes"] == report["stack_bytes"] == 0, report
        assert report["registers"] <= registers, report


def assert_whole_accesses(compiled, target: str) -> None:
    """Loads and stores of 16 bytes, and none of 2."""
    if target == "gfx942":
        assert re.search(r"(?:global|buffer)_store_dwordx4", compiled.asm["amdgcn"])
    else:
        accesses = re.findall(r"(?:ld|st)\.global((?:\.\w+)*)", compiled.asm["ptx"])
        assert sum(".v4.b32" in kind for kind in accesses) >= 2
        assert not any(".b16" in kind or ".u16" in kind for kind in accesses)


def describe(target: str, kernel: str, dim: int, v_dim: int, dtype: torch.dtype, compiled) -> dict:
    """One row of the table."""
    choice, row = None, dict.fromkeys(FIELDS, "")
    with compiling_for(target, {}):
        choice = launch.find_launch(kernel.split("_")[0], dim, v_dim, dtype)
    row |= {"triton": triton.__version__, "target": target, "kernel": kernel, "tier": "tl", "dim": dim, "v_dim": v_dim}
    row |= {"dtype": str(dtype).removeprefix("torch."), "rows": choice.rows, "keys": choice.keys}
    row |= {"warps": choice.options["num_warps"], "stages": choice.options["num_stages"]}
    row["shared_bytes"] = compiled.metadata.shared
    if target == "gfx942":
        asm = compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", asm)[1])
        row["spill_bytes"] = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", asm)[1])
        row["stack_bytes"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", asm)[1])
        shapes = Counter(re.findall(r"v_mfma_f32_(\d+x\d+x\d+)", asm))
        row["narrow_loads"] = len(re.findall(r"(?:global|buffer)_load_(?:ushort|short|d16)", asm))
    else:
        ptx = compiled.asm["ptx"]
        row |= assemble(ptx, target)
        shapes = Counter(re.findall(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
        row["mma_sync"] = sum(n for shape, n in shapes.items() if not shape.startswith("m64"))
        row["narrow_loads"] = len(re.findall(r"ld\.global(?:\.\w+)*?\.[bu]16", ptx))
        shapes["tcgen05.mma"] = len(re.findall(r"tcgen05\.mma\.", ptx))  # its size is in a register
        issued, useful = 0, PRODUCTS[kernel][0] * dim + PRODUCTS[kernel][1] * v_dim
        for shape, n in shapes.items():
            if shape == "tcgen05.mma":
                continue
            m, columns, depth = map(int, re.findall(r"\d+", shape))
            # Every warp runs the instruction; one of m64 is shared by the four of a warpgroup.
            issued += n * m * columns * depth * choice.options["num_warps"] // (4 if m == 64 else 1)
        row["issued_over_useful"] = round(issued / (choice.rows * choice.keys * useful), 3) or ""
    row["matrix"] = " ".join(f"{n}*{shape}" for shape, n in sorted(shapes.items()) if n)
    return row


def rows_for(targets=TARGETS, dims=tuple(DIMS), dtypes=(torch.bfloat16,)):
    """Rows of the table, one for each kernel, target and head dim."""
    for target in targets:
        for dtype in dtypes:
            for dim, v_dim in dims:
                for kernel, compiled in compile_attend(target, dim, v_dim, dtype).items():
                    yield describe(target, kernel, dim, v_dim, dtype, compiled)
                if target == "sm_90" and dim == v_dim and dim in hopper_attend.DIMS and not gate.missing_api():
                    yield describe_gluon(dim, dtype, compile_gluon(dim, dtype)["gluon"])


def main() -> None:
    """Write the rows of this Triton into the table, and keep those of other versions."""
    with open(TABLE, newline="") as file:
        others = [row for row in csv.DictReader(file) if row["triton"] != triton.__version__]
    rows = []
    for row in rows_for():
        print(*row.values(), flush=True)
        rows.append(row)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: row["triton"]))


if __name__ == "__main__":
    main()
