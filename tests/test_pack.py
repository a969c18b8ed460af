"""The operators pack and unpack."""

from __future__ import annotations

import torch

from triton_sp import packing

# Two tensors of (3, 2, D) and (2, 1, D); row 1 of head 1 of the first is in two boxes.
BOXES = [(0, 0, 3, 0, 2, 0, 3), (1, 0, 2, 0, 1, 2, 3), (0, 1, 1, 1, 1, 8, 1)]
SIZE = 9


def test_operators_are_sound() -> None:
    """Fake kernels, autograd registration and aliasing, as torch checks them."""
    boxes = packing.box_table(BOXES, torch.device("cpu"))
    xs = [torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)]
    torch.library.opcheck(packing._pack, (xs, boxes, SIZE))
    torch.library.opcheck(packing._unpack, (torch.randn(SIZE, 4, requires_grad=True), boxes, [3, 2], [2, 1]))


def test_unpack_is_the_adjoint_of_pack() -> None:
    boxes = packing.box_table(BOXES, torch.device("cpu"))
    xs = [torch.randn(3, 2, 4, dtype=torch.double), torch.randn(2, 1, 4, dtype=torch.double)]
    y = torch.randn(SIZE, 4, dtype=torch.double)
    back = packing.unpack(y, boxes, [(3, 2), (2, 1)])
    packed = packing.pack(xs, boxes, SIZE)
    torch.testing.assert_close((packed * y).sum(), sum((a * b).sum() for a, b in zip(xs, back, strict=True)))


def test_gradients() -> None:
    boxes = packing.box_table(BOXES, torch.device("cpu"))
    xs = [torch.randn(3, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(1)]
    xs.append(torch.randn(2, 1, 2, dtype=torch.double, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *x: packing.pack(x, boxes, SIZE), xs)
    flat = torch.randn(SIZE, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(packing.unpack(x, boxes, [(3, 2), (2, 1)])), flat)
