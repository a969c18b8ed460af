"""Whether the Gluon tier (attend.py beside this file) may run on a device: only where its self-check has passed.

The self-check (check.py) never runs by itself: a program calls it, or `make gpu`. Its verdict is a JSON file in
the user's cache, and a call only reads that. So no call waits for a check, none runs while a CUDA graph is captured,
and all ranks of a machine find the same answer. No file, or one that cannot be read, means no.
"""

import functools
import hashlib
import importlib
import json
import os
import pathlib
from typing import NamedTuple

import torch
import triton

from triton_sp import cache
from triton_sp._version import __version__

MISSING = "no self-check ran on this machine with these versions: python -m triton_sp.kernels.hopper.check"
SOURCES = ("hopper/attend.py", "hopper/tiles.py", "hopper/check.py", "tiles.py", "launch.py")
# What the kernel is made of.
API = [
    ("nvidia.hopper.tma", "async_copy_global_to_shared"),
    ("nvidia.hopper.mbarrier", "expect"),
    ("nvidia.hopper", "warpgroup_mma"),
    ("nvidia.hopper", "warpgroup_mma_wait"),
    ("nvidia.hopper", "fence_async_shared"),
    ("", "warp_specialize"),
]


class Verdict(NamedTuple):
    """Whether the tier may run, and why (not)."""

    passed: bool
    reason: str


def verdict(device: torch.device | str) -> Verdict:
    """The answer for a device. The file is read once in a process, TRITON_SP_GLUON=0 holds at any time."""
    if os.environ.get("TRITON_SP_GLUON") == "0":
        return Verdict(False, "TRITON_SP_GLUON=0")
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return Verdict(False, f"{device} is no GPU that PyTorch sees")
    return known(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def known(index: int) -> Verdict:
    """What holds for GPU number `index`, all but the environment variable."""
    reason = obstacle(index)
    return Verdict(False, reason) if reason else read(machine(index))


def obstacle(index: int) -> str:
    """Why there is nothing to check on a GPU, or ""."""
    if torch.version.hip is not None:
        return "not an NVIDIA GPU"
    if torch.cuda.get_device_capability(index) != (9, 0):
        return f"the kernel is for sm_90, not sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}"
    return missing_api()


def missing_api() -> str:
    """What this Triton's Gluon lacks of what the kernel needs, or ""."""
    for module, name in API:
        path = ".".join(filter(None, ("triton.experimental.gluon.language", module)))
        try:
            found = hasattr(importlib.import_module(path), name)
        except ImportError:
            found = False
        if not found:
            return f"Triton {triton.__version__} has no {path}.{name}"
    if hasattr(importlib.import_module("triton.experimental.gluon.language.nvidia.hopper.tma"), "async_load"):
        # The old name stays there, and raises where it is used.
        return f"Triton {triton.__version__} has async_load in the place of async_copy_global_to_shared"
    return ""


def machine(index: int) -> dict[str, str]:
    """What a verdict holds for: a change in any of these calls for a new self-check."""
    here = pathlib.Path(__file__).parent.parent
    source = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES))
    return {
        "gpu": torch.cuda.get_device_name(index),
        "driver": driver(),
        "triton": triton.__version__,
        "assembler": os.environ.get("TRITON_PTXAS_PATH", "bundled"),
        "triton_sp": __version__,
        "kernel": source.hexdigest()[:16],
    }


def driver() -> str:
    """The version of the NVIDIA driver; where /proc does not tell, that of the CUDA it brings."""
    try:
        return pathlib.Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"


def path_of(where: dict[str, str]) -> pathlib.Path:
    """The file in which a verdict is kept."""
    return cache.cache_file(f"gluon-{hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]}")


def read(where: dict[str, str]) -> Verdict:
    """The recorded verdict. A file that is not one in every part counts as none."""
    path = path_of(where)
    try:
        record = cache.load(path)
        fits = record["machine"] == where and type(record["passed"]) is bool and isinstance(record["reason"], str)
    except FileNotFoundError:
        return Verdict(False, MISSING)
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    return Verdict(record["passed"], record["reason"]) if fits else Verdict(False, f"not a verdict: {path}")


def write(where: dict[str, str], found: Verdict) -> pathlib.Path:
    """Record a verdict, and say where."""
    return cache.store(path_of(where), {"machine": where, **found._asdict()})
