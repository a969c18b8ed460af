"""pack and unpack: kernels against their twins. Runs in the interpreter (TRITON_INTERPRET=1) or on a GPU."""

from __future__ import annotations

import pytest
import torch

from triton_sp.ops import dispatch, pack, reference
from triton_sp.plan.heads import assign_heads, route
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def test_kernels_run() -> None:
    assert dispatch.implementation(DEVICE) != "reference"


def states(rows: int, counts: list[int], dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As a projection leaves them: slices of one tensor."""
    torch.manual_seed(rows)
    return list(torch.randn(rows, sum(counts), dim, device=DEVICE).to(dtype).split(counts, 1))


# In the interpreter a case takes a second: some, `make interpreter` has the others.
LONG = [] if DEVICE.type == "cuda" else [pytest.mark.long]


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(72, torch.float32), (256, torch.float16)]
    + [
        pytest.param(dim, dtype, marks=LONG)
        for dim, dtype in [(64, torch.float32), (80, torch.float32), (128, torch.float32), (256, torch.float32)]
        + [(dim, torch.float16) for dim in (64, 72, 80, 128)]
    ],
)
def test_legs_of_a_route(dim: int, dtype: torch.dtype) -> None:
    """Fractions of heads, key/value heads for two ranks: copies are bitwise, sums to rounding."""
    work, shards = Segments((0, 30, 75)).work(causal=True), shard_tokens(75, 3)
    way = route(shards, assign_heads(4, 2, 3, work), 1)
    table = pack.box_table(way.inputs.boxes, DEVICE)
    xs = states(25, [4, 2, 2], dim, dtype)
    packed = pack.pack(xs, table, sum(way.inputs.sizes))
    assert torch.equal(packed.cpu(), reference.pack([x.cpu() for x in xs], table.tolist(), len(packed)))
    found = pack.unpack(packed, table, [(25, 4), (25, 2), (25, 2)])
    for one, other in zip(found, reference.unpack(packed.cpu(), table.tolist(), [25] * 3, [4, 2, 2]), strict=True):
        torch.testing.assert_close(one.cpu(), other)

    received = torch.randn(sum(way.arrivals.sizes), dim, device=DEVICE).to(dtype)
    table = pack.box_table(way.arrivals.boxes, DEVICE)
    shapes = [s for i in way.tasks for s in [(len(i.rows), len(i.q))] + [(len(i.keys), len(i.kv))] * 2]
    assert len(shapes) == 6  # two items: two launches
    for one, other in zip(
        pack.unpack(received, table, shapes),
        reference.unpack(received.cpu(), table.tolist(), [r for r, _ in shapes], [h for _, h in shapes]),
        strict=True,
    ):
        assert torch.equal(one.cpu(), other)
    outs = [torch.randn(rows, heads, dim, device=DEVICE).to(dtype) for rows, heads in shapes[::3]]
    table = pack.box_table(way.outputs.boxes, DEVICE)
    size = sum(way.outputs.sizes)
    expected = reference.pack([out.cpu() for out in outs], table.tolist(), size)
    assert torch.equal(pack.pack(outs, table, size).cpu(), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rope", "norm"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (72, torch.float32),
        *(pytest.param(dim, dtype, marks=LONG) for dim, dtype in [(128, torch.float32), (64, torch.float16)]),
    ],
)
def test_norm_and_rotation(dim: int, dtype: torch.dtype, rope: bool, norm: bool, interleaved: bool) -> None:
    """Forward, and the gradients of q, k, v and of the norms' weights, against autograd of the formula."""
    work, shards, rows = Segments((0, 35)).work(), shard_tokens(35, 2), 18
    way = route(shards, assign_heads(2, 1, 2, work), 0)
    table, size = pack.box_table(way.inputs.boxes, DEVICE), sum(way.inputs.sizes)
    angles = torch.randn(rows, dim, device=DEVICE)  # any tables: nothing is assumed about them
    tables = (angles.cos(), (2 * angles).sin()) if rope else None
    weights = tuple(torch.rand(dim, device=DEVICE) + 0.5 for _ in range(2)) if norm else None
    upstream = torch.randn(size, dim, device=DEVICE).to(dtype)

    def run(fused: bool) -> list[torch.Tensor]:
        xs = [x.detach().requires_grad_() for x in states(rows, [2, 1, 1], dim, dtype)]
        ws = [w.detach().requires_grad_() for w in weights or ()]
        if fused:
            pair = (ws[0], ws[1]) if ws else None
            out = pack.pack_rotated(*xs, table, size, tables=tables, weights=pair, eps=1e-5, interleaved=interleaved)
        else:
            turned = [
                reference.norm_and_rotate(x, tables, ws[i] if ws else None, 1e-5, interleaved)
                for i, x in enumerate(xs[:2])
            ]
            out = pack.pack([*turned, xs[2]], table, size)
        return [out.detach(), *torch.autograd.grad(out, [*xs, *ws], upstream)]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


def test_empty() -> None:
    empty = torch.zeros(0, 2, 64, device=DEVICE)
    assert pack.pack([empty] * 3, pack.box_table([], DEVICE), 0).shape == (0, 64)
    (out,) = pack.unpack(torch.zeros(0, 64, device=DEVICE), pack.box_table([], DEVICE), [(3, 2)])
    assert torch.equal(out.cpu(), torch.zeros(3, 2, 64))
