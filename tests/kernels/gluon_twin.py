"""Gluon kernels run as plain Python: each program by itself, on torch tensors, what is asynchronous at once.

Gluon has no interpreter. But a kernel is a Python function, so it runs as it stands once `gl` and the instructions of
Hopper are stood in for. Shared memory begins as NaN. A barrier knows how many bytes it waits for; waiting for one that
is not complete raises, since nothing else could complete it. Reads and writes outside a tensor raise. What is not seen:
layouts, races between warps, and rounding, since everything is computed in float64.
"""

from __future__ import annotations

import types
from typing import Any

import torch

WIDE = torch.float64


class Pointer:
    """Into a dense tensor, by elements."""

    def __init__(self, x: torch.Tensor, at: Any = 0) -> None:
        assert x.is_contiguous()
        self.flat, self.at = x.view(-1), at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + offset)

    __radd__ = __add__

    def where(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices, and which of them count; all of these must be inside."""
        at = torch.as_tensor(self.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        assert bool(((at >= 0) & (at < self.flat.numel()))[mask].all()), "outside of a tensor"
        return at, mask


class Number(int):
    """An integer as kernels have it; what is computed of it is one too."""

    def to(self, dtype: Any) -> Number:
        return self


def _kept(operation: Any) -> Any:
    def method(self: Number, other: Any) -> Any:
        found = operation(self, other)
        return Number(found) if isinstance(found, int) else found

    return method


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
    setattr(Number, _name, _kept(getattr(int, _name)))


class Descriptor:
    """What the TMA reads: blocks of a tensor, with 0 outside of it."""

    def __init__(self, x: torch.Tensor, rows: int, columns: int) -> None:
        self.x, self.block, self.layout, self.dtype = x, (rows, columns), None, WIDE


class Tile:
    """A piece of shared memory; views of it share it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.dtype = x, WIDE

    def index(self, i: int) -> Any:
        found = self.x[int(i)]
        return Tile(found) if isinstance(found, torch.Tensor) else found

    def reshape(self, shape: list[int]) -> Tile:
        return Tile(self.x.view(shape))

    def permute(self, order: tuple[int, ...]) -> Tile:
        return Tile(self.x.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Tile:
        return Tile(self.x.narrow(dim, start, length))

    def load(self, layout: Any) -> torch.Tensor:
        return self.x.clone()

    def store(self, value: torch.Tensor) -> None:
        self.x.copy_(value)


class Barrier:
    """Counts the phases that are complete."""

    def __init__(self) -> None:
        self.missing, self.phase, self.asked = 0, 0, False

    def expect(self, size: int) -> None:
        assert not self.asked, "expected twice in a phase"
        self.missing, self.asked = self.missing + size, True
        self._settle()

    def arrived(self, size: int) -> None:
        self.missing -= size
        self._settle()

    def _settle(self) -> None:
        if self.asked and self.missing == 0:
            self.phase, self.asked = self.phase + 1, False

    def wait(self, parity: int) -> None:
        assert (self.phase - 1) % 2 == parity and self.phase > 0, "waits for what nothing completes"


class Bars:
    def __init__(self, count: int) -> None:
        self.of = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.of[int(i)]


class Program:
    """One program of a grid, and the module `gl` as it sees it."""

    float32, int64, constexpr = WIDE, "int64", None

    def __init__(self, ids: tuple[int, int]) -> None:
        self.ids = ids

    def program_id(self, axis: int) -> Number:
        return Number(self.ids[axis])

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype == "int64":
            return Bars(shape[0])
        return Tile(torch.full(shape, torch.nan, dtype=WIDE))

    def zeros(self, shape: list[int], dtype: Any, layout: Any) -> torch.Tensor:
        return torch.zeros(shape, dtype=WIDE)

    def zeros_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def arange(self, first: int, stop: int, layout: Any = None) -> torch.Tensor:
        return torch.arange(first, stop)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, torch.Tensor):
            return torch.where(condition, a, b)
        return Number(a if condition else b)

    def maximum(self, a: Any, b: Any) -> Any:
        return Number(max(a, b))

    def minimum(self, a: Any, b: Any) -> Any:
        return Number(min(a, b))

    def exp2(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp2(x)

    def static_range(self, *bounds: int) -> range:
        return range(*bounds)

    def thread_barrier(self) -> None:
        """Warps run in step here."""

    def convert_layout(self, x: torch.Tensor, layout: Any) -> torch.Tensor:
        return x

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
        at, mask = pointer.where(mask)
        found = torch.where(mask, pointer.flat[torch.where(mask, at, 0)], torch.tensor(other, dtype=pointer.flat.dtype))
        return found if found.ndim else Number(found)

    def atomic_add(self, pointer: Pointer, x: torch.Tensor, mask: Any, sem: str) -> None:
        at, mask = pointer.where(mask)
        pointer.flat.index_put_((at[mask],), x[mask], accumulate=True)

    def __getattr__(self, name: str) -> Any:
        """Layouts are made and mean nothing."""
        if name.endswith("Layout"):
            return Layout
        raise AttributeError(name)


class Layout:
    def __init__(self, *_: Any) -> None: ...

    @staticmethod
    def get_default_for(*_: Any) -> None: ...


def copy(descriptor: Descriptor, place: list[int], barrier: Barrier, tile: Tile) -> None:
    """At once: nothing may rely on its being later."""
    (row, head, column), (rows, columns) = place, descriptor.block
    found = torch.zeros(rows, columns, dtype=WIDE)
    piece = descriptor.x[max(row, 0) : row + rows, head, column : column + columns]
    assert row >= 0 and tile.x.numel() == found.numel()
    found[: piece.shape[0], : piece.shape[1]] = piece
    tile.x.copy_(found.view(tile.x.shape))
    barrier.arrived(2 * rows * columns)


def multiply(a: Any, b: Tile, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> torch.Tensor:
    found = (a.x if isinstance(a, Tile) else a) @ b.x
    return found + acc if use_acc else found


def wait(count: int, deps: list[torch.Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def run(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """All programs of a grid, one after another. Tensors become pointers, integers numbers."""
    arguments = tuple(
        Pointer(x) if isinstance(x, torch.Tensor) else Number(x) if isinstance(x, int) else x for x in arguments
    )
    for ids in ((i, j) for j in range(grid[1]) for i in range(grid[0])):
        gl = Program(ids)
        fake = {
            "gl": gl, "tl": types.SimpleNamespace(load=gl.load, where=gl.where, minimum=gl.minimum,
                                                  maximum=gl.maximum, int32="int32", constexpr=None),
            "fence_async_shared": lambda: None, "warpgroup_mma": multiply, "warpgroup_mma_wait": wait,
            "tma": types.SimpleNamespace(async_copy_global_to_shared=copy),
            "mbarrier": types.SimpleNamespace(
                init=lambda bar, count: None, MBarrierLayout=Layout, expect=Barrier.expect, wait=Barrier.wait
            ),
        }  # fmt: skip
        rebuilt(kernel, fake, {})(*arguments, **constants)


def rebuilt(kernel: Any, fake: dict[str, Any], done: dict[str, Any]) -> Any:
    """The function of a kernel, and of those that it calls, with stand-ins in the place of the GPU."""
    function = kernel.fn
    if function in done:
        return done[function]
    space = dict(function.__globals__)
    done[function] = made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__)
    for name in function.__code__.co_names:
        if hasattr(space.get(name), "fn"):
            space[name] = rebuilt(space[name], fake, done)
    space |= fake
    return made
