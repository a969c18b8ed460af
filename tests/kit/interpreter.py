"""Triton's interpreter, in a process of its own: the switch must be set before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_sp.ops import dispatch

needs_triton = pytest.mark.skipif(
    not dispatch.HAS_TRITON, reason="needs Triton, of which there is none for this platform"
)


def interpret(folder: Path, *files: str) -> None:
    """Run these test files of a folder where kernels are interpreted on the CPU.

    Raises:
        AssertionError: one of their tests has failed; with what pytest said.
    """
    switches = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | switches | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", *files, "-x", "--noconftest"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
