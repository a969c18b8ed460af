"""Which implementation computes an operator: chosen here and nowhere else, by device and by what is installed, never by
a silent fallback.
"""

from __future__ import annotations

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def implementation(device: torch.device | str) -> str:
    """What computes attention for tensors on a device: "gluon", "triton", "triton-interpret" or "reference".

    "triton" on CUDA and ROCm devices where Triton is installed; "gluon" instead on an sm_90 GPU where the self-check of
    that tier has passed (`kernels.hopper.gate.verdict(device)` says why not), for the calls that
    `kernels.hopper.attend.takes`, the others and all gradients being "triton" as before; "triton-interpret" on the CPU
    where TRITON_INTERPRET=1 is set (before the first import of triton; for tests); "reference", eager PyTorch,
    everywhere else.

    Raises:
        UnsupportedKernelError: on this GPU the kernels have failed their self-check, which runs before the first call
            on a machine (`kernels/check.py`).

    >>> implementation("meta")
    'reference'
    """
    found = portable(device)
    if found == "triton":
        from triton_sp.kernels import check  # here, so that the package imports without Triton
        from triton_sp.kernels.hopper import gate

        check.require(device)
        return "gluon" if gate.verdict(device).passed else found
    return found


def portable(device: torch.device | str) -> str:
    """`implementation` without the Gluon tier: torch.compile traces this, and could not trace a file being read."""
    kind = torch.device(device).type
    if not HAS_TRITON or kind not in ("cuda", "cpu"):
        return "reference"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton-interpret"
    return "triton" if kind == "cuda" else "reference"
