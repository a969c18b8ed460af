"""Whether the Gluon tier (attend.py beside this file) may run on a device: only where its self-check has passed.

This self-check (check.py) never runs by itself: a program calls it, or `make gpu`. A call only reads the verdict
(kernels/verdict.py), so none waits for a check, and none runs while a CUDA graph is captured. No verdict means no.
"""

import functools
import importlib
import os

import torch
import triton

from triton_sp.kernels import check
from triton_sp.kernels import verdict as verdicts
from triton_sp.kernels.verdict import Verdict

FORWARD, BACKWARD = "gluon", "gluon-backward"  # each by itself: one may be right where the other is not
MISSING = "no self-check ran on this machine with these versions: python -m triton_sp.kernels.check"
# The portable kernels too: they are what it is compared with.
SOURCES = (*(f"hopper/{name}.py" for name in ("attend", "backward", "check", "gate", "moves", "tiles")), *check.SOURCES)
# What the kernel is made of.
API = [
    ("nvidia.hopper.tma", "async_copy_global_to_shared"),
    ("nvidia.hopper.mbarrier", "expect"),
    ("nvidia.hopper", "warpgroup_mma"),
    ("nvidia.hopper", "warpgroup_mma_wait"),
    ("nvidia.hopper", "fence_async_shared"),
    ("", "warp_specialize"),
]


def verdict(device: torch.device | str, kind: str = FORWARD) -> Verdict:
    """The answer for a device and a direction. The file is read once in a process; TRITON_SP_GLUON=0 holds at any
    time, for both."""
    if os.environ.get("TRITON_SP_GLUON") == "0":
        return Verdict(False, "TRITON_SP_GLUON=0")
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return Verdict(False, f"{device} is no GPU that PyTorch sees")
    return known(torch.cuda.current_device() if device.index is None else device.index, kind)


@functools.cache
def known(index: int, kind: str = FORWARD) -> Verdict:
    """What holds for GPU number `index`, all but the environment variable."""
    if reason := obstacle(index):
        return Verdict(False, reason)
    return verdicts.read(kind, machine(index)) or Verdict(False, MISSING)


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
    return verdicts.machine(index, SOURCES)
