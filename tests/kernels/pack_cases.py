"""pack and unpack: kernels against their twins. Runs in the interpreter (TRITON_INTERPRET=1) or on a GPU."""

from __future__ import annotations

import pytest
import torch

from triton_sp.kernels.mask import Norm, Rotation
from triton_sp.ops import dispatch, pack, reference
from triton_sp.plan.boxes import route
from triton_sp.plan.heads import assign_heads
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import shard_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
def test_boxes_of_a_route(dim: int, dtype: torch.dtype) -> None:
    """Fractions of heads, key/value heads for two ranks: copies are bitwise, sums to rounding."""
    work, shards = Segments((0, 30, 75)).work(causal=True), shard_tokens(75, 3)
    way = route(shards, assign_heads(4, 2, 3, work), 1)
    table = pack.box_table(way.inputs.boxes, DEVICE)
    xs = states(25, [4, 2, 2], dim, dtype)
    packed = pack.pack_boxes(xs, table, sum(way.inputs.sizes))
    assert torch.equal(packed.cpu(), reference.pack_boxes([x.cpu() for x in xs], table.tolist(), len(packed)))
    assert_unpacks(lambda ys: pack.unpack_boxes(packed, table, ys), packed, table, xs)
    received = torch.randn(sum(way.arrivals.sizes), dim, device=DEVICE).to(dtype)
    table = pack.box_table(way.arrivals.boxes, DEVICE)
    shapes = [s for i in way.tasks for s in [(len(i.rows), len(i.q))] + [(len(i.keys), len(i.kv))] * 2]
    assert len(shapes) == 6  # two tasks
    places = [torch.empty(*shape, dim, device=DEVICE, dtype=dtype) for shape in shapes]
    assert_unpacks(lambda ys: pack.unpack_boxes(received, table, ys), received, table, places)


def assert_unpacks(run, flat, table, xs):
    """What the kernels write to strided places is what the twin writes."""
    found = [torch.empty(x.shape[0], 2 * x.shape[1], x.shape[2], device=DEVICE, dtype=x.dtype)[:, ::2] for x in xs]
    expected = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    run(found)
    reference.unpack_boxes(flat.cpu(), table.tolist(), expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize(
    ("counts", "ranks", "dim", "dtype"),
    [
        ([4, 4, 4], 2, 72, torch.float32),
        ([8, 2, 2], 4, 80, torch.float16),
        pytest.param([8, 4, 4], 4, 128, torch.float16, marks=LONG),
        pytest.param([4], 4, 64, torch.float32, marks=LONG),
        pytest.param([6, 1, 1], 3, 56, torch.float32, marks=LONG),
    ],
)
def test_whole_heads(counts: list[int], ranks: int, dim: int, dtype: torch.dtype) -> None:
    """Copies are bitwise, sums to rounding, of and to strided tensors; another number of rows is no multiple of a
    tile's."""
    xs = states(21, counts, dim, dtype)
    packed = pack.pack_heads(xs, ranks)
    assert torch.equal(packed.cpu(), reference.pack_heads([x.cpu() for x in xs], ranks))
    back = states(21, counts, dim, dtype)
    pack.unpack_heads(packed, back, ranks)
    expected = [torch.empty(x.shape, dtype=dtype) for x in xs]
    reference.unpack_heads(packed.cpu(), expected, ranks)
    for one, other in zip(back, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


TURNED = pytest.mark.parametrize(
    ("counts", "ranks", "dim", "rotary", "dtype"),
    [
        ([4, 1, 1], 2, 80, 32, torch.float64),
        pytest.param([4, 2, 2], 2, 72, 72, torch.float32, marks=LONG),
        pytest.param([3, 1], 1, 64, 24, torch.float16, marks=LONG),
        pytest.param([6, 1, 1], 3, 20, 10, torch.float32, marks=LONG),
        pytest.param([4, 4, 4], 2, 128, 128, torch.float16, marks=LONG),
    ],
)


@TURNED
def test_rotation(counts: list[int], ranks: int, dim: int, rotary: int, dtype: torch.dtype) -> None:
    """q and k are rotated on the way, v and what lies past the rotated numbers is not; the way back is what autograd
    makes of the rotation. The halves of the tables differ, as nothing says that they are alike."""
    xs, wide = states(13, counts, dim, dtype), torch.promote_types(dtype, torch.float32)
    rotation = Rotation(*torch.randn(2, 13, rotary, device=DEVICE, dtype=wide))
    leaves = [x.double().requires_grad_() for x in xs]
    turned = [formula(x, rotation) for x in leaves[:2]] + leaves[2:]
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    packed = pack.pack_heads(xs, ranks, rotation)
    expected = reference.pack_heads([x.detach().cpu() for x in turned], ranks)
    torch.testing.assert_close(packed.cpu().double(), expected, **tolerance)
    back = states(13, counts, dim, dtype)
    pack.unpack_heads(packed, back, ranks, rotation.adjoint)
    sums = [torch.empty_like(x, device="cpu") for x in leaves]
    reference.unpack_heads(packed.cpu().double(), sums, ranks)
    expected = torch.autograd.grad(turned, leaves, [x.to(DEVICE) for x in sums])
    for one, other in zip(back, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@TURNED
def test_norm(counts: list[int], ranks: int, dim: int, rotary: int, dtype: torch.dtype) -> None:
    """q and k are normalised before they are rotated; the way back, and the sums for the weights, are what autograd
    makes of that. Rows have other strides than their gradients. Sums are the same bits in each run."""
    xs, wide = states(13, counts, dim, dtype), torch.promote_types(dtype, torch.float32)
    weights = torch.randn(2, dim, device=DEVICE, dtype=wide).requires_grad_()
    norm = Norm(tuple(weights), 2.0**-6, 1.0)  # type: ignore[arg-type]
    rotation = Rotation(*torch.randn(2, 13, rotary, device=DEVICE, dtype=wide), norm=norm)
    leaves = [x.double().requires_grad_() for x in xs]
    turned = [formula(normalised(x, w, norm), rotation) for x, w in zip(leaves, weights.double(), strict=False)]
    turned += leaves[2:]
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    with torch.no_grad():
        packed = pack.pack_heads(xs, ranks, rotation)
    expected = reference.pack_heads([x.detach().cpu() for x in turned], ranks)
    torch.testing.assert_close(packed.cpu().double(), expected, **tolerance)
    back, again = ([torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for _ in range(2))
    adjoint = rotation.of(xs[0], xs[1], *norm.weights).adjoint
    dweights = pack.unpack_heads(packed, back, ranks, adjoint)
    sums = [torch.empty_like(x, device="cpu") for x in leaves]
    reference.unpack_heads(packed.cpu().double(), sums, ranks)
    *expected, expected_weights = torch.autograd.grad(turned, [*leaves, weights], [x.to(DEVICE) for x in sums])
    for one, other in zip([*back, dweights], [*expected, expected_weights], strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one.double() / size, other.double() / size, **tolerance)
    assert dweights.dtype == wide and torch.equal(pack.unpack_heads(packed, again, ranks, adjoint), dweights)
    frozen = norm._replace(weights=tuple(weights.detach()))
    adjoint = rotation._replace(norm=frozen).of(xs[0], xs[1], *frozen.weights).adjoint
    assert pack.unpack_heads(packed, again, ranks, adjoint) is None
    assert all(torch.equal(one, other) for one, other in zip(again, back, strict=True))


def normalised(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm as transformers' models write it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (norm.offset + weight)


def formula(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The rotation as transformers' models write it."""
    d = rotation.cos.shape[-1]
    cos, sin = (table.double()[:, None] for table in rotation[:2])
    first, second = x[..., :d].chunk(2, -1)
    return torch.cat([x[..., :d] * cos + torch.cat([-second, first], -1) * sin, x[..., d:]], -1)


def test_empty() -> None:
    empty = torch.zeros(0, 2, 64, device=DEVICE)
    assert pack.pack_heads([empty] * 3, 2).shape == (0, 64)
    assert pack.pack_boxes([empty] * 3, pack.box_table([], DEVICE), 0).shape == (0, 64)
    y = torch.ones(3, 2, 64, device=DEVICE)
    pack.unpack_boxes(torch.zeros(0, 64, device=DEVICE), pack.box_table([], DEVICE), [y])
    assert not y.any()
