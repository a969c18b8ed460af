"""The operator splice: its laws, the kernel in Triton's interpreter, and what it compiles to."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from triton_sp.errors import InputError
from triton_sp.ops import dispatch, splice

HERE = pathlib.Path(__file__).parent
INDEX = torch.tensor([-1, 2, -4, 0, -6])  # visual row 1 and most rows of text have no token; the last is 0


def inputs() -> list[torch.Tensor]:
    return [torch.randn(rows, 3, dtype=torch.double, requires_grad=True) for rows in (5, 3)]


def test_operator_is_sound() -> None:
    """Fake kernels, autograd registration and aliasing, as torch checks them; gradients against differences."""
    torch.library.opcheck(splice._splice, (*inputs(), INDEX))
    torch.library.opcheck(splice._splice_backward, (torch.randn(5, 3), INDEX, 5, 3))
    assert torch.autograd.gradcheck(lambda text, visual: splice.splice(text, visual, INDEX), inputs())


@pytest.mark.parametrize(
    ("text", "visual", "index"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 1).long()),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)),
        *((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(rows)) for rows in ([2, -1], [-4], [1, 1], [-2, -2])),
    ],
)
def test_what_does_not_fit_raises(text: torch.Tensor, visual: torch.Tensor, index: torch.Tensor) -> None:
    with pytest.raises(InputError):
        splice.splice(text, visual, index)


needs_triton = pytest.mark.skipif(
    not dispatch.HAS_TRITON, reason="needs Triton, of which there is none for this platform"
)


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    # In a process of its own: the switch must be set before Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "splice_cases.py", "-x", "--noconftest"]
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
def test_compiled(target: str, tmp_path, monkeypatch) -> None:
    """Forward and backward at the width of a 7B model: no spill, whole 16-byte loads and stores."""
    import compile_table as ct

    from triton_sp.kernels import splice

    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    x, index = torch.zeros(9, 3584, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int64)
    for text in (x, None):
        compiled: dict = {}
        with ct.compiling_for(target, compiled):
            splice.splice(text, x, index)
        kernel = compiled["splice_rows"]
        if target == "gfx942":
            assert re.search(r"\.vgpr_spill_count:\s+0\b", kernel.asm["amdgcn"])
            assert re.search(r"(?:global|buffer)_store_dwordx4", kernel.asm["amdgcn"])
            continue
        report = ct.assemble(kernel.asm["ptx"], target)
        assert report["spill_bytes"] == report["stack_bytes"] == 0, report
        assert report["registers"] <= 64, report
        accesses = re.findall(r"(?:ld|st)\.global((?:\.\w+)*)", kernel.asm["ptx"])
        assert sum(".v4.b32" in kind for kind in accesses) >= 2
        assert not any(".b16" in kind or ".u16" in kind for kind in accesses)
        assert "atom" not in kernel.asm["ptx"] and "red.global" not in kernel.asm["ptx"]
