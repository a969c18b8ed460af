"""The operators pack and unpack: laws of the twins, the kernels in Triton's interpreter, and what they compile to."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.interpreter import needs_triton

from triton_sp.kernels.mask import Norm, Rotation
from triton_sp.ops import pack
from triton_sp.plan.boxes import route
from triton_sp.plan.heads import assign_heads
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards

# Two tensors of (3, 2, D) and (2, 1, D); row 1 of head 1 of the first is in two boxes.
BOXES = [(0, 0, 3, 0, 2, 0, 3), (1, 0, 2, 0, 1, 2, 3), (0, 1, 1, 1, 1, 8, 1)]
SIZE = 9


def table(boxes: list[tuple[int, ...]] = BOXES) -> torch.Tensor:
    return pack.box_table(boxes, torch.device("cpu"))


def unpack(flat: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    ys = [flat.new_empty(*shape, flat.shape[-1]) for shape in shapes]
    pack.unpack_boxes(flat, table(), ys)
    return ys


def test_unpack_boxes_is_the_adjoint_of_pack_boxes() -> None:
    xs = [torch.randn(3, 2, 4, dtype=torch.double), torch.randn(2, 1, 4, dtype=torch.double)]
    y = torch.randn(SIZE, 4, dtype=torch.double)
    packed = pack.pack_boxes(xs, table(), SIZE)
    back = unpack(y, [(3, 2), (2, 1)])
    torch.testing.assert_close((packed * y).sum(), sum((a * b).sum() for a, b in zip(xs, back, strict=True)))


@given(st.integers(0, 5), st.sampled_from([(4, 4, 2), (8, 2, 4), (6, 1, 3), (4, 4, 1)]))
def test_whole_heads_are_the_boxes_of_a_route(rows: int, counts: tuple[int, int, int]) -> None:
    """Addresses in closed form are those of the table, forward and adjoint."""
    heads, kv_heads, ranks = counts
    shards = Shards((rows,) * ranks)
    tasks = assign_heads(heads, kv_heads, ranks, Segments((0, rows * ranks)).work())
    way = route(shards, tasks, 0)
    xs = [torch.randn(rows, h, 3, dtype=torch.double) for h in (heads, kv_heads, kv_heads)]
    boxes = pack.box_table(way.inputs.boxes, torch.device("cpu"))
    packed = pack.pack_heads(xs, ranks)
    assert torch.equal(packed, pack.pack_boxes(xs, boxes, sum(way.inputs.sizes)))
    found, expected = ([torch.empty_like(x) for x in xs] for _ in range(2))
    y = torch.randn_like(packed)
    pack.unpack_heads(y, found, ranks)
    pack.unpack_boxes(y, boxes, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("normalises", [False, True])
def test_rotated_where_nothing_is_exchanged(rows: int, normalises: bool) -> None:
    """Also on a rank without tokens: its gradients are empty, and 0 for the weights."""
    weights = tuple(torch.ones(4, dtype=torch.double, requires_grad=True) for _ in range(2 * normalises))
    rotation = Rotation(*torch.randn(2, rows, 4, dtype=torch.double), norm=Norm(weights, 0.1) if normalises else None)  # type: ignore[arg-type]
    q, k = (torch.randn(rows, heads, 4, dtype=torch.double, requires_grad=True) for heads in (2, 1))
    turned = pack.Rotate.apply(q, k, rotation, *weights)
    assert [x.shape for x in turned] == [q.shape, k.shape]
    grads = torch.autograd.grad(turned, (q, k, *weights), [torch.ones_like(x) for x in turned])
    assert [x.shape for x in grads] == [x.shape for x in (q, k, *weights)]
    assert all(bool(x.any()) == bool(rows) for x in grads[2:])
    if rows:
        assert torch.autograd.gradcheck(lambda *x: pack.Rotate.apply(x[0], x[1], rotation, *weights), (q, k))


@needs_triton
@pytest.mark.parametrize(("target", "dim"), [("sm_90", 72), ("sm_90", 128), ("sm_80", 80), ("gfx942", 128)])
def test_compiled(target: str, dim: int, tmp_path, monkeypatch) -> None:
    """No spill, and whole 16-byte loads and stores."""
    import compiling as ct

    from triton_sp.kernels import boxes, pack

    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    xs = list(torch.zeros(32, 12, dim, dtype=torch.bfloat16).split(4, 1))
    flat = torch.zeros(32 * 12, dim, dtype=torch.bfloat16)
    rotation = Rotation(*torch.zeros(2, 32, dim, dtype=torch.bfloat16))
    weight = torch.zeros(dim, dtype=torch.bfloat16, requires_grad=True)
    for norm in (None, Norm((weight, weight), 1e-6)):
        turned: dict = {}
        with ct.compiling_for(target, turned):
            asked = rotation._replace(norm=norm)
            pack.unpack(pack.pack(xs, 2, asked), xs, 2, asked.of(xs[0], xs[1], weight, weight).adjoint)
        for kernel in turned.values():
            ct.assert_no_spill(kernel, target)
    compiled: dict = {}
    with ct.compiling_for(target, compiled):
        pack.pack(xs, 2)
        pack.unpack(flat, xs, 2)
        boxes.pack(xs[:2], table([(0, 0, 32, 0, 3, 0, 6)]), 192)
        boxes.unpack(flat, table([(0, 0, 32, 0, 3, 0, 6)]), xs[:2])
    assert compiled.keys() == {"pack_heads", "unpack_heads", "pack_boxes", "unpack_boxes"}
    for kernel in compiled.values():
        ct.assert_no_spill(kernel, target)
        ct.assert_whole_accesses(kernel, target)
