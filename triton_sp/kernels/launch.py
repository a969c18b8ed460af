"""How the kernels are launched: tile sizes, warps and stages per architecture, in one table.

The table is the same on every rank, so that every rank runs the same code. Tuning is opt-in: `TRITON_SP_TUNED` names
a JSON file, as perf/tune.py writes it, whose entries take the place of these for all who read it.
"""

import functools
import json
import math
import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_sp.errors import InputError, UnsupportedKernelError

# Triton 3.7 reads outside shared memory where a tile 32 wide meets wgmma (triton issue 11366, seen with 3.7.1).
NO_32_WIDE = triton.__version__.startswith("3.7.")

# Arguments that change from batch to batch: specialising on them (is it 1? is it a multiple of 16?) would only compile
# the same kernel again.
RUNTIME = [
    *(f"{x}_{axis}" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for axis in ("row", "head")),
    *("rows", "keys", "segments", "heads", "group", "each", "causal", "left", "right"),
]  # fmt: skip

DIMS = range(16, 257, 8)  # head dims that kernels exist for
WINDOW = 64  # tokens; where no segment is longer, half of a tile of 128 rows would be empty


class Launch(NamedTuple):
    """Rows and keys of a tile, the head dims and their parts, whether masks are branched around, and the options of
    the launch."""

    rows: int
    keys: int
    parts: dict[str, int]
    branch: bool
    options: dict[str, Any]


def _options(rows: int, keys: int, warps: int, stages: int, **more: int) -> tuple[int, int, dict[str, int]]:
    return rows, keys, {"num_warps": warps, "num_stages": stages, **more}


# (kernel, largest D of the row): rows, keys, options. Chosen from the compile table, not measured on a GPU yet.
# On Hopper 128 registers a thread (maxnreg) lets two blocks of 8 warps share an SM, one computing while one waits.
SM90 = {
    ("forward", 64): _options(128, 64, 8, 3, maxnreg=128),
    # 3.9.0 needs a few more than 128 at D = 72 and 80: with them 24 and 36 bytes are spilled.
    ("forward", 80): _options(128, 64, 8, 2, **({"maxnreg": 128} if triton.__version__ < "3.9" else {})),
    ("forward", 96): _options(128, 64, 8, 2),
    ("forward", 128): _options(128, 128, 8, 2),
    ("forward", 192): _options(128, 64, 8, 2),
    ("forward", 256): _options(128, 32, 8, 2),  # 64 keys spill 16 to 64 bytes from D = 200 on
    ("dq", 64): _options(128, 64, 8, 2, maxnreg=128),
    ("dq", 128): _options(128, 64, 8, 2),
    ("dq", 192): _options(128, 32, 8, 2),
    ("dq", 256): _options(128, 32, 8, 1),
    # Of 64 rows each product reads as much shared memory as the matrix units can use; 32 rows keep them at two thirds.
    # Above 80 the sums leave no registers for 64: 128 bytes spilled at 96, 224 at 128. With products that begin with
    # the rows' statistics 96 fits, but ptxas then waits for the product before (C7517), and at 128 48 to 124 bytes
    # spill; keys and values as operands in registers are read from shared memory anew for every block.
    ("dkv", 80): _options(64, 128, 8, 2),
    ("dkv", 192): _options(32, 128, 8, 2),
    ("dkv", 256): _options(16, 128, 8, 1),
    # One block of keys for each tile, and nothing to load ahead: two to four blocks of 4 warps share an SM.
    ("forward of windows", 128): _options(64, 64, 4, 1),
    ("dq of windows", 128): _options(64, 64, 4, 1),
    ("dkv of windows", 80): _options(64, 64, 4, 1),
    ("dkv of windows", 128): _options(32, 64, 4, 1),
}
SM80 = {
    ("forward", 48): _options(128, 64, 8, 2),
    ("forward", 64): _options(128, 64, 4, 2),
    ("forward", 96): _options(128, 64, 8, 2),
    ("forward", 128): _options(128, 32, 8, 2),
    ("forward", 160): _options(128, 32, 8, 1),
    ("forward", 176): _options(128, 16, 8, 1),
    ("forward", 192): _options(128, 32, 8, 1),
    ("forward", 256): _options(128, 16, 8, 1),
    ("dq", 64): _options(64, 32, 4, 2),
    ("dq", 128): _options(128, 32, 8, 2),
    ("dq", 192): _options(64, 16, 4, 1),
    ("dq", 256): _options(32, 16, 4, 1),
    ("dkv", 64): _options(32, 64, 4, 2),
    ("dkv", 80): _options(16, 64, 4, 2),
    ("dkv", 128): _options(16, 128, 8, 2),
    ("dkv", 192): _options(16, 64, 4, 1),
    ("dkv", 256): _options(16, 32, 4, 1),
}
# The tiles of sm_80 that spill here have others: forward 76 bytes at 64, 24 at 88, 16 at 200; dk 24 at 256.
SM100 = SM80 | {
    ("forward", 64): _options(128, 64, 8, 2),
    ("forward", 96): _options(128, 32, 8, 2),
    ("forward", 256): _options(64, 32, 4, 1),
    ("dkv", 128): _options(32, 128, 8, 1),
    ("dkv", 256): _options(16, 64, 8, 1),
}
# Consumer chips (sm_86, sm_89, sm_120) have 99 KiB of shared memory a block.
SMALL = {(kernel, dim): _options(32, 32, 4, 1) for kernel in ("forward", "dq", "dkv") for dim in (128, 256)}
CDNA = {
    ("forward", 128): _options(128, 64, 4, 1),
    ("forward", 256): _options(64, 32, 4, 1),
    ("dq", 128): _options(64, 32, 4, 1),
    ("dq", 256): _options(32, 32, 4, 1),
    ("dkv", 256): _options(32, 64, 4, 1),
}
# fp32 is multiplied exactly, without matrix units; it is there to check against, not to be fast.
FP32 = {(kernel, dim): _options(32, 32, 4, 1) for kernel in ("forward", "dq", "dkv") for dim in (128, 256)}
# Small enough that a segment of 40 tokens has several tiles; the interpreter pays by the program.
INTERPRETER = {(kernel, 256): _options(32, 16, 4, 1) for kernel in ("forward", "dq", "dkv")}
INTERPRETER |= {(f"{kernel} of windows", 256): _options(16, 16, 4, 1) for kernel in ("forward", "dq", "dkv")}

TABLES = {"cuda:90": SM90, "cuda:80": SM80, "cuda:100": SM100, "cuda": SMALL, "hip": CDNA, "interpreter": INTERPRETER}


def target() -> str:
    """Which table holds here: that of the chip, such as "cuda:90", or of its maker, or "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    found = triton.runtime.driver.active.get_current_target()
    exact = f"{found.backend}:{found.arch}"
    return exact if exact in TABLES else found.backend


@functools.cache
def tuned() -> dict[str, list[Any]]:
    """The entries of the file that TRITON_SP_TUNED names: {"cuda:90 forward 72": [rows, keys, options]}.

    Raises:
        InputError: there is no such file, or something else in it.
    """
    path = os.environ.get("TRITON_SP_TUNED")
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(1 << 20))
        wrong = [key for key, entry in entries.items() if not _is_launch(entry)]
        found = f"{entries[wrong[0]]!s:.60} for {wrong[0]!r:.40}" if wrong else ""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        entries, found = {}, f"{type(error).__name__}: {error!s:.80}"
    if found:
        raise InputError(
            "TRITON_SP_TUNED",
            expected='a JSON file of {"cuda:90 forward 72": [rows, keys, {"num_warps": 4}]}, as perf/tune.py writes it',
            found=f"{path}: {found}",
            remedy="write it anew, or unset the variable",
        )
    return entries


def _is_launch(entry: Any) -> bool:
    """Tiles of powers of two and options that are small numbers: what a launch may be, whoever wrote it."""

    def small(x: Any, most: int) -> bool:
        return type(x) is int and 0 <= x <= most

    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], dict):
        return False
    tiles = all(small(x, 512) and x >= 16 and x & (x - 1) == 0 for x in entry[:2])
    return tiles and all(small(value, 512) for value in entry[2].values())


def find_launch(kernel: str, dim: int, v_dim: int, dtype: torch.dtype, longest: int | None = None) -> Launch:
    """The tile, parts and options for a kernel ("forward", "dq" or "dkv"), the head dims of q and v, a dtype, and the
    longest segment where the host knows it. Any launch is right for any segments.

    Raises:
        UnsupportedKernelError: there is no kernel for a head dim or the dtype.
    """
    where = target()
    _check_dims(dim, v_dim)
    # Triton's interpreter multiplies the bit patterns of bf16 (3.6.0 and 3.9.0), without a word.
    allowed = [torch.float32, torch.float16] + [torch.bfloat16] * (where != "interpreter")
    if dtype not in allowed:
        raise UnsupportedKernelError(
            "dtype of q, k, v",
            expected=" or ".join(str(x) for x in allowed),
            found=str(dtype),
            remedy="convert them, or unset TRITON_INTERPRET" if where == "interpreter" else "convert them",
        )
    table = FP32 if dtype == torch.float32 and where != "interpreter" else TABLES[where]
    widest = max(dim, v_dim)
    names = [f"{kernel} of windows"] if longest is not None and longest <= WINDOW else []
    found = (key for name in (*names, kernel) for key in sorted(table) if key[0] == name and key[1] >= widest)
    key = next(found)
    rows, keys, options = tuned().get(f"{where} {key[0]} {widest}", table[key])
    if NO_32_WIDE and where == "cuda:90":
        rows, keys = max(rows, 64), max(keys, 64)
    (d0, d1), (v0, v1) = split(dim), split(v_dim)
    parts = {"D": dim, "D0": d0, "D1": d1, "V": v_dim, "V0": v0, "V1": v1}
    # The interpreter takes the branch too: it is what must be proven, the other path masks every block.
    return Launch(rows, keys, parts, where in ("cuda:90", "interpreter"), options)


def _check_dims(dim: int, v_dim: int) -> None:
    for name, found in (("head dim of q and k", dim), ("head dim of v", v_dim)):
        if found not in DIMS:
            raise UnsupportedKernelError(
                name,
                expected=f"a multiple of 8 from {DIMS[0]} to {DIMS[-1]}",
                found=str(found),
                remedy="pad with zeros to the next of these, or run the reference on the CPU",
            )


def split(dim: int) -> tuple[int, int]:
    """The two parts that a head dim is cut in: powers of two from 16 to 128, as few columns as that allows.

    >>> split(80), split(72), split(56), split(192), split(256)
    ((64, 16), (64, 16), (64, 0), (128, 64), (128, 128))
    """
    whole = max(triton.next_power_of_2(dim), 16)
    first = whole // 2
    second = max(triton.next_power_of_2(dim - first), 16)
    if NO_32_WIDE:
        first, second = (64 if part == 32 else part for part in (first, second))
        whole = 64 if whole == 32 else whole
    return (whole, 0) if first + second >= whole and whole <= 128 else (first, second)


def processors(device: torch.device) -> int:
    """How many programs run at a time where each takes a whole multiprocessor; of an H100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where its last dim is not contiguous (an expanded gradient, a transposed head dim).

    Also where rows lie so far apart that a tile of 128 would exceed 32-bit offsets.
    """
    return x if x.stride(-1) == 1 and x.stride(0) < 1 << 24 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """The unit that all row and head strides are multiples of, 8 or 1, and the strides counted in it.

    >>> strides(torch.empty(10, 4, 72))
    (8, [36, 9])
    """
    found = [stride for x in tensors for stride in x.stride()[:2]]
    if any(stride % 8 for stride in found):
        return 1, found
    return 8, [stride // 8 for stride in found]


def score_factors(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """`inner` and `outer` of the kernels: scores in base 2 are soft(q k^T, inner) * outer."""
    log2e = math.log2(math.e)
    return (-2 * log2e * softmax_scale / softcap, softcap * log2e) if softcap else (0.0, softmax_scale * log2e)
