"""The operator splice: its laws, the kernel in Triton's interpreter, and what it compiles to."""

from __future__ import annotations

import os

import pytest
import torch
from kit.interpreter import needs_triton

from triton_sp.errors import InputError
from triton_sp.ops import splice

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


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
def test_compiled(target: str, tmp_path, monkeypatch) -> None:
    """Forward and backward at the width of a 7B model: no spill, whole 16-byte loads and stores."""
    import compiling as ct

    from triton_sp.kernels import splice

    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    x, index = torch.zeros(9, 3584, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int64)
    for text in (x, None):
        compiled: dict = {}
        with ct.compiling_for(target, compiled):
            splice.splice(text, x, index)
        kernel = compiled["splice_rows"]
        ct.assert_no_spill(kernel, target, registers=64)
        ct.assert_whole_accesses(kernel, target)
        if target != "gfx942":
            assert "atom" not in kernel.asm["ptx"] and "red.global" not in kernel.asm["ptx"]
