"""Run a program's tensors without their numbers: every float is allocated, counted and never touched.

Integers and booleans are computed as ever, so that what depends on ids, masks and cu_seqlens goes its true way; an
operation on floats only gets outputs of the right shape. Memory that nobody touches is not backed by the machine, so a
step of a model that fills eight GPUs can be followed on a laptop, allocation by allocation.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from triton_sp.kernels.mask import Grads, Mask
from triton_sp.ops import varlen

aten = torch.ops.aten
_T = TypeVar("_T")
# Operations that give what they are given; `_unsafe_view`, of products, does not say that it is a view.
AS_IT_IS = (aten._local_scalar_dense.default, aten.lift_fresh.default, aten.detach.default, aten._unsafe_view.default)
LARGE = 1 << 26
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Linux; in Python from 3.13 on


class Hollow(TorchDispatchMode):
    """Within it no float is computed. `now` and `peak` are the bytes of tensors that are alive, and the most so far;
    `flops` are those of products, convolutions and attention.

    What an operation needs inside of itself is not seen, nor what an allocator wastes. A view holds its whole storage.

    >>> with Hollow() as hollow:
    ...     x = torch.randn(1000, 1000)
    ...     y = (x @ x)[:1]                     # holds all of the product
    ...     del x
    >>> hollow.now, hollow.peak, tuple(y.shape)
    (4000000, 8000000, (1, 1000))
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known: set[int] = set()
        self.shapes: dict[Any, Any] = {}  # what operations gave, by what they were given

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, so that torch need not see to it at each operation: it took 40 us of each."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        for x in _tensors((out,)):
            self._see(x.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        way = _way(func)
        if way == "wait":
            return args[0]  # not another tensor
        if way != "same":
            inputs = [*_tensors(args), *_tensors(kwargs.values())]
            if not inputs or any(x.is_floating_point() for x in inputs):
                return _write(func, args, kwargs) if way == "write" else self._shape(func, args, kwargs)
        return func(*args, **kwargs)

    def _shape(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation returns, without its numbers."""
        if func is aten.allclose.default:
            return True  # there are no numbers to differ
        if func in (aten.index.Tensor, aten.index_put.default):  # a mask's shape depends on its values: as indices
            args = (args[0], [y for x in args[1] for y in _as_index(x)], *args[2:])
        if func is aten.masked_select.default:
            return args[0].new_empty(int(torch.broadcast_to(args[1], args[0].shape).sum()))
        key = (func, _asked(args), *((name, _asked(x)) for name, x in kwargs.items()))
        if key not in self.shapes:
            self.shapes[key] = func(
                *map(_meta, args), **{name: _meta(x) for name, x in kwargs.items()} | _device(func, kwargs)
            )
        shapes = self.shapes[key]
        if any(not x.is_floating_point() for x in _tensors((shapes,))):
            return func(*args, **kwargs)
        out = _allocate(shapes)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += counted(*args, **kwargs, out_val=out)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, **_: Any) -> tuple[Tensor, Tensor]:
        """In the place of the attention kernels: two products."""
        self.flops += 2 * pairs(mask, len(q)) * q.shape[1] * (q.shape[2] + v.shape[2])
        return varlen.empty_results(q, k, v)

    def attend_backward(
        self, dout: Tensor, dlse: Any, states: Any, mask: Mask, *, grads: Any = None, **_: Any
    ) -> Grads:
        """In the place of their backward: five products."""
        q, k, v, _out, _lse, *sinks = states
        self.flops += 2 * pairs(mask, len(q)) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])
        return Grads(*(grads or map(torch.empty_like, (q, k, v))), *(x.new_empty(x.shape) for x in sinks))

    def aside(
        self, function: Callable[..., _T], results: Callable[[_T], Iterable[Tensor]], once: bool = False
    ) -> Callable[..., _T]:
        """A function by its numbers, of whose tensors only the results are counted: one that works on the CPU in a run
        on GPUs.

        Args:
            once: whether all calls are given what the first one gave.
        """
        made: list[_T] = []

        def run(*args: Any, **kwargs: Any) -> _T:
            if not (once and made):
                with _disable_current_modes():
                    made[:] = [function(*args, **kwargs)]
            for x in results(made[0]):
                self._see(x.untyped_storage())
            return made[0]

        return run

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # the object lives as long as the memory
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def pairs(mask: Mask, rows: int) -> int:
    """How many (row, key) pairs of a head a mask lets through.

    >>> pairs(Mask(torch.tensor([0, 4, 6]), causal=True), 6), pairs(Mask(torch.tensor([0, 4, 6])), 6)
    (13, 20)
    """
    if mask.key_ranges is not None:
        return int((mask.key_ranges[1] - mask.key_ranges[0]).clamp(min=0)[:rows].long().sum())
    cu_q, cu_k, used, _ = mask.tables
    assert cu_q is not None and cu_k is not None
    q = cu_q.diff().long()
    k = cu_k.diff().long() if used is None else used.long()
    first = (k - q).clamp(min=0)  # keys before the first row, whose last key is its own; or all, if not causal
    seen = q * first + q * (q + 1) // 2 if mask.causal else q * k
    if mask.window is not None:
        seen = torch.minimum(seen, q * (mask.window if mask.causal else 2 * mask.window - 1))
    return int(seen.sum())


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes."""
    return [
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]


def _write(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation that writes its arguments: nothing is done to floats."""
    written = _written(func, args, kwargs)
    if all(x.is_floating_point() for x in _tensors(written)):
        return written[0] if len(written) == 1 else tuple(written)
    return func(*args, **kwargs)


def _as_index(x: Tensor | None) -> list[Tensor | None]:
    if x is None or x.dtype not in (torch.bool, torch.uint8):
        return [x]
    return list(x.nonzero(as_tuple=True))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among values, and among the values of lists and tuples. `tensors_in` of trial.py knows mappings too; it
    takes 6 us an operation where this takes 2 (measured)."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _asked(x: Any) -> Any:
    """What of an argument decides about the shapes of results."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_asked, x)) if isinstance(x, list | tuple) else (type(x), x)


def _meta(x: Any) -> Any:
    """A tensor without storage in the place of one, of the same shape and strides; also in lists."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, list | tuple):
        return [_meta(y) for y in x]
    return torch.device("meta") if isinstance(x, torch.device) else x


@cache
def _way(func: Any) -> str:
    """What is done about an operation: it waits, runs as it is, writes its arguments, or has its results allocated."""
    if func.namespace == "_c10d_functional" and "wait_tensor" in func.name():
        return "wait"
    if func.is_view or func in AS_IT_IS:
        return "same"
    return "write" if func._schema.is_mutable and func.namespace == "aten" else "shape"


@cache
def _takes_device(func: Any) -> bool:
    return any(a.name == "device" for a in func._schema.arguments)


def _device(func: Any, kwargs: dict[str, Any]) -> dict[str, torch.device]:
    """Where a factory makes its tensor."""
    return {"device": torch.device("meta")} if _takes_device(func) and kwargs.get("device") is None else {}


def _allocate(x: Any) -> Any:
    """Tensors like meta tensors; a large one in address space only, which the system is not asked to have."""
    if isinstance(x, list | tuple):
        return type(x)(map(_allocate, x))
    if not isinstance(x, Tensor):
        return x
    elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    size = elements * x.element_size()
    if size < LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    storage = torch.frombuffer(space, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
