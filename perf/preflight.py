"""The first step of `make gpu`: what machine this is, and whether Triton works on it at all, into machine.json."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from perf import machine

PEERS = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "transformers", "deepspeed", "pytest", "hypothesis")


def release(ptxas: str | Path) -> tuple[int, ...]:
    """The release of an assembler, or () where the file is none.

    >>> release("/no/such/ptxas")
    ()
    """
    try:
        text = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def assemblers() -> dict[str, tuple[int, ...]]:
    """Every ptxas of this machine with its release, the newest first; that of TRITON_SP_PTXAS before all."""
    places = [os.environ.get("TRITON_SP_PTXAS", ""), shutil.which("ptxas") or ""]
    places += map(str, sorted(Path("/usr/local").glob("cuda*/bin/ptxas")))
    if importlib.util.find_spec("triton"):
        folder = Path(str(importlib.util.find_spec("triton").origin)).parent / "backends" / "nvidia" / "bin"  # type: ignore[union-attr]
        places += map(str, sorted(folder.glob("ptxas*")))
    found = {place: release(place) for place in dict.fromkeys(places) if place}
    usable = [place for place, number in found.items() if number]
    usable.sort(key=lambda place: (place == places[0], found[place]), reverse=True)
    return {place: found[place] for place in usable}


def in_use() -> tuple[int, ...]:
    """The release that Triton takes for the GPU at hand (without one: for sm_90)."""
    chip = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return release(importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(10 * chip[0] + chip[1]).path)


def installed(name: str) -> str:
    """The version of a package, "yes" for a module without one, "" where it is not there."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ImportError:
        found = False
    return (machine.version(name.split(".")[0]) or "yes") if found else ""


def trial() -> str:
    """What is wrong with a kernel that adds 1, or ""; it needs a C compiler, Python.h and a driver that works."""
    import triton
    import triton.language as tl

    @triton.jit
    def add_one(x_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(x_ptr + at, tl.load(x_ptr + at) + 1.0)

    x = torch.zeros(64, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        add_one[(1,)](x, SIZE=64)
        return "" if float(x.sum()) == 64.0 else f"64 times 0 + 1 came out as {x.tolist()}"
    except Exception as error:  # whatever a compiler, a linker or a driver may say
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def main() -> int:
    """Entry point; 1 where Triton does not work."""
    begin = time.monotonic()
    found: dict[str, Any] = dict(machine.describe())
    found["python_header"] = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    found["c_compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""
    found["assembler_in_use"] = ".".join(map(str, in_use()))
    found["assemblers"] = {place: ".".join(map(str, number)) for place, number in assemblers().items()}
    found["packages"] = {name: installed(name) for name in PEERS}
    found["sanitizer"] = shutil.which("compute-sanitizer") or ""
    found["nvidia_smi"] = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout.splitlines() if (
        shutil.which("nvidia-smi")) else []  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"cuda": torch.version.cuda, "memory_free": free, "memory": total}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["kernel"] = trial() or "ok"
    found["seconds"] = round(time.monotonic() - begin, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = machine.results(device, device.type == "cpu") / "machine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "nvidia_smi"}, indent=1))
    return int(found["kernel"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
