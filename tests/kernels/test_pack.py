"""The operators pack and unpack: laws of the twins, the kernels in Triton's interpreter, and what they compile to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from kit.interpreter import interpret, needs_triton

from triton_sp.ops import pack

# Two tensors of (3, 2, D) and (2, 1, D); row 1 of head 1 of the first is in two boxes.
BOXES = [(0, 0, 3, 0, 2, 0, 3), (1, 0, 2, 0, 1, 2, 3), (0, 1, 1, 1, 1, 8, 1)]
SIZE = 9


def table(boxes: list[tuple[int, ...]] = BOXES) -> torch.Tensor:
    return pack.box_table(boxes, torch.device("cpu"))


def test_operators_are_sound() -> None:
    """Fake kernels, autograd registration and aliasing, as torch checks them."""
    xs = [torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)]
    torch.library.opcheck(pack._pack, (xs, table(), SIZE))
    torch.library.opcheck(pack._unpack, (torch.randn(SIZE, 4, requires_grad=True), table(), [3, 2], [2, 1]))
    boxes = table([(i, 0, 3, 0, 1, i, 3) for i in range(3)])
    q, k, v = (torch.randn(3, 1, 4, requires_grad=True) for _ in range(3))
    tables, weights = [torch.randn(3, 4)] * 2, [torch.rand(4, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(pack._pack_rotated, ([q, k, v], boxes, 9, tables, weights, 1e-6, False))


def test_unpack_is_the_adjoint_of_pack() -> None:
    xs = [torch.randn(3, 2, 4, dtype=torch.double), torch.randn(2, 1, 4, dtype=torch.double)]
    y = torch.randn(SIZE, 4, dtype=torch.double)
    back = pack.unpack(y, table(), [(3, 2), (2, 1)])
    packed = pack.pack(xs, table(), SIZE)
    torch.testing.assert_close((packed * y).sum(), sum((a * b).sum() for a, b in zip(xs, back, strict=True)))


def test_gradients() -> None:
    xs = [torch.randn(*shape, 2, dtype=torch.double, requires_grad=True) for shape in ((3, 2), (2, 1))]
    assert torch.autograd.gradcheck(lambda *x: pack.pack(x, table(), SIZE), xs)
    flat = torch.randn(SIZE, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(pack.unpack(x, table(), [(3, 2), (2, 1)])), flat)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rope", "norm"), [(True, True), (True, False), (False, True)])
def test_gradients_with_norm_and_rotation(rope: bool, norm: bool, interleaved: bool) -> None:
    boxes = table([(0, 0, 3, 0, 2, 0, 4), (1, 0, 3, 0, 1, 2, 4), (2, 0, 3, 0, 1, 3, 4), (1, 1, 2, 0, 1, 12, 1)])
    wide = {"dtype": torch.double}
    xs = [torch.randn(3, heads, 4, **wide, requires_grad=True) for heads in (2, 1, 1)]
    tables = (torch.randn(3, 4, **wide), torch.randn(3, 4, **wide)) if rope else None
    weights = [torch.rand(4, **wide, requires_grad=True) for _ in range(2)] if norm else []

    def run(q, k, v, *ws):
        return pack.pack_rotated(q, k, v, boxes, 14, tables=tables, weights=ws or None, interleaved=interleaved)

    assert torch.autograd.gradcheck(run, (*xs, *weights))


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    interpret(Path(__file__).parent, "pack_cases.py")


@needs_triton
@pytest.mark.parametrize(("target", "dim"), [("sm_90", 72), ("sm_90", 128), ("sm_80", 80), ("gfx942", 128)])
def test_compiled(target: str, dim: int, tmp_path, monkeypatch) -> None:
    """No spill, and whole 16-byte loads and stores of the states wherever neither norm nor rotation is asked for."""
    import compile_table as ct

    from triton_sp.kernels import pack

    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    xs = list(torch.zeros(32, 9, dim, dtype=torch.bfloat16).split(3, 1))[:2]
    flat, angles = torch.zeros(192, dim, dtype=torch.bfloat16), torch.zeros(32, dim)
    boxes, extras = table([(0, 0, 32, 0, 3, 0, 6)]), ((angles, angles), (angles[0], angles[0]), 1e-6, 1)
    plain: dict = {}
    full: dict = {}
    with ct.compiling_for(target, plain):
        pack.pack(xs, boxes, 192)
        pack.unpack(flat, boxes, [32] * 2, [3] * 2)
    with ct.compiling_for(target, full):
        pack.pack(xs, boxes, 192, *extras)
        pack.unpack(flat, boxes, [32] * 2, [3] * 2, xs, *extras)
    assert plain.keys() == full.keys() == {"pack_boxes", "unpack_boxes"}
    for kernel in (*plain.values(), *full.values()):
        ct.assert_no_spill(kernel, target)
    for kernel in plain.values():
        ct.assert_whole_accesses(kernel, target)
