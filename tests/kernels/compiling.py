"""Kernels compiled for a chip that is not there: their registers, spills, loads and matrix instructions.

The ordinary host launchers run on CPU tensors with a stand-in driver that only says which chip it is, and every launch
compiles without running. So the arguments are specialised exactly as on that chip. Tables of it are written row by row:
several processes may share the work, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may use
LOGS: dict[str, str] = {}  # what the assembler said, by the kernel's hash
GRIDS: dict[str, tuple[int, ...]] = {}  # how many programs were last launched, likewise


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
def compiling_for(target: str, compiled: dict[str, Any]) -> Iterator[None]:
    """Inside, launching a kernel compiles it for `target` and puts it into `compiled` under its name."""
    real = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = real(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        LOGS.setdefault(kernel.hash, log.getvalue())
        GRIDS[kernel.hash] = grid
        name = self.__name__.removeprefix("attend_")
        if name == "gluon" and options["WAIT"]:
            name = "gluon_wait"
        if options.get("DK") != options.get("DV"):  # one of the two launches at D = 256
            name += "_dk" if options["DK"] else "_dv"
        compiled[name] = kernel

    driver, JITFunction.run = triton.runtime.driver._active, compile_only
    triton.runtime.driver.set_active(StandInDriver(TARGETS[target]))
    try:
        # A kernel out of Triton's cache has no log; the assembler would have to run again.
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
            triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
            yield
    finally:
        JITFunction.run = real
        triton.runtime.driver._active = driver


def measure(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, spills, stack and warnings as the assembler reports them, and what is in the code.

    `loads` are those of the loops with products, by bytes a thread; `products` the multiplications that the
    instructions of one warp do; `mma_sync` the instructions that are not a whole warpgroup's.
    """
    found: dict[str, Any] = {"shared_bytes": compiled.metadata.shared, "warnings": ""}
    if target == "gfx942":
        asm = compiled.asm["amdgcn"]
        found["registers"] = int(_first(r"\.vgpr_count:\s+(\d+)", asm))
        found["spill_bytes"] = 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", asm))
        found["stack_bytes"] = int(_first(r"\.private_segment_fixed_size:\s+(\d+)", asm))
        shapes = Counter(re.findall(r"v_mfma_f32_(\d+x\d+x\d+)", asm))
    else:
        asm, log = compiled.asm["ptx"], LOGS[compiled.hash]
        used, stack = _first(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack.*?(\d+).*?(\d+)", log)
        assert stack is not None
        found["registers"], found["stack_bytes"] = int(used), int(stack[1])
        found["spill_bytes"] = int(stack[2]) + int(stack[3])
        found["warnings"] = " ".join(sorted(set(re.findall(r"C75\d\d", log))))
        shapes = Counter(re.findall(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)", asm))
        shapes.update(_tensor_memory_products(asm))
    found["loads"] = _counted(_load_widths(main_loop(asm)))
    found["mma_sync"] = sum(n for shape, n in shapes.items() if re.fullmatch(r"m16\S*|m8\S*", shape))
    found["matrix"] = " ".join(f"{n}*{shape}" for shape, n in sorted(shapes.items()))
    # One of m64 is shared by the four warps of a warpgroup, one of tensor memory (t) by all.
    shared = {"m64": 4, "t64": compiled.metadata.num_warps, "t12": compiled.metadata.num_warps}
    found["products"] = sum(
        n * math.prod(map(int, re.findall(r"\d+", shape))) / shared.get(shape[:3], 1) for shape, n in shapes.items()
    )
    return found


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text[:500])
    return found[1]


def accesses(compiled: Any, target: str) -> str:
    """Loads and stores of global memory in the whole kernel, by bytes a thread."""
    asm = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    wide = {"": 1, "x2": 2, "x3": 3, "x4": 4}
    amd = [4 * wide[many] for many in re.findall(r"(?:global|buffer)_store_dword(x\d)?\b", asm)]
    stores = [
        int(many or 1) * int(bits) // 8 for many, bits in re.findall(r"st\.global\S*?(?:\.v(\d))?\.[bu](\d+)\b", asm)
    ]
    return f"loads {_counted(_load_widths(asm))}, stores {_counted([*amd, *stores])}"


def _counted(widths: list[int]) -> str:
    return " ".join(f"{n}*{width}" for width, n in sorted(Counter(widths).items(), reverse=True))


def _load_widths(asm: str) -> list[int]:
    """Bytes a thread of each load from global memory."""
    copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], 0x(\w+)", asm)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bu](\d+)\b", asm)
    amd = re.findall(r"(?:global|buffer)_load_(ushort|short_d16|ubyte|dwordx?(\d?))", asm)
    return [
        *(int(width, 16) for width in copies),
        *(int(many or 1) * int(bits) // 8 for many, bits in loads),
        *(4 * int(many or 1) if name.startswith("dword") else 2 for name, many in amd),
    ]


def _tensor_memory_products(ptx: str) -> Counter[str]:
    """The products of sm_100's fifth generation. Their size is in a descriptor, a constant in a register."""
    found: Counter[str] = Counter()
    for descriptor in re.findall(r"tcgen05\.mma\.\S*\s+\[[^]]*\], [^,]+, [^,]+, (%r\d+)", ptx):
        value = int(_first(rf"mov\.b32\s+{descriptor}, (-?\d+);", ptx))
        found[f"t{(value >> 24 & 31) * 16}n{(value >> 17 & 63) * 8}k16"] += 1
    return found


def main_loop(asm: str) -> str:
    """From a label to the last branch back to it: the loop with most products, the shortest of them."""
    found = [""]
    for label in re.finditer(r"^(\S*BB\w+):", asm, re.M):
        back = [x.end() for x in re.finditer(rf"bra\w*\S*\s+{re.escape(label[1])}\b", asm)]
        found.append(asm[label.end() : max([label.end(), *back])])
    return max(found, key=lambda loop: (loop.count("mma"), -len(loop)))


def assert_no_spill(compiled: Any, target: str, registers: int = 255) -> None:
    """No register spilled, no stack, and at most so many registers (on NVIDIA's chips)."""
    found = measure(compiled, target)
    assert found["spill_bytes"] == found["stack_bytes"] == 0, found
    assert target == "gfx942" or found["registers"] <= registers, found


def assert_whole_accesses(compiled: Any, target: str) -> None:
    """Loads and stores of 16 bytes, and none of 2."""
    if target == "gfx942":
        assert re.search(r"(?:global|buffer)_store_dwordx4", compiled.asm["amdgcn"])
    else:
        accesses = re.findall(r"(?:ld|st)\.global((?:\.\w+)*)", compiled.asm["ptx"])
        assert sum(".v4.b32" in kind for kind in accesses) >= 2
        assert not any(".b16" in kind or ".u16" in kind for kind in accesses)


class Table:
    """A CSV whose first columns, `keys`, name a row. Rows are replaced at once, whoever else writes."""

    def __init__(self, path: Path, fields: list[str], keys: int) -> None:
        self.path, self.fields, self.keys = path, fields, keys

    def read(self) -> dict[tuple[str, ...], dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            return {self.key(row): row for row in csv.DictReader(file)}

    def key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.fields[: self.keys])

    def put(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds or replaces rows."""
        lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read() | {self.key(row): row for row in rows}
            written = self.path.with_suffix(".new")
            with written.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.fields, lineterminator="\n", restval="")
                writer.writeheader()
                # Numbers as numbers: 72 before 128.
                order = sorted(found, key=lambda key: [x.zfill(8) if x.isdigit() else x for x in key])
                writer.writerows(found[key] for key in order)
            os.replace(written, self.path)
        finally:
            os.close(lock)
