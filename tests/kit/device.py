"""A device that is not the CPU, in CPU memory: what a GPU asks of this library beside its kernels, where there is none.

Numbers are computed by PyTorch's CPU operators, so results can be compared. As on a GPU, an operator whose tensors are
on two devices raises; whatever the host learns from the device is a read, for which it would have to wait; and the
engine runs the backward in a thread of its own, in which context variables have their defaults.

It is PyTorch's device for backends written in Python. To register it changes a process for good (Trainers would train
on it), so tests start processes for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

KIND = "pretend"
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default, aten.linear.default}
SIZES = {aten.nonzero.default, aten.masked_select.default}  # whose result is as large as the device says
reads: Counter[str] = Counter()  # by the module that asks, since the first product of matrices
_seen = {"products": 0}
_libraries: list[torch.library.Library] = []  # what is registered lasts as long as these


class OnDevice(Tensor):
    """A tensor of the device, and its numbers in CPU memory. Views of one are views of the other."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        """Of the same sizes and strides as `held`."""
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=f"{KIND}:0", **place)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Where the numbers are: this library tells tensors by it."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """A read."""
        _note_read()
        return self.held.tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.held})"


def register() -> None:
    """Make the device known to PyTorch, once in a process."""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    # Operators that PyTorch has an implementation of for every device do not come to the fallback.
    factories = torch.library.Library("aten", "IMPL")
    for op in _factories():
        factories.impl(op, lambda *args, op=op, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    factories.impl("_copy_from", _copy_from, "PrivateUse1")  # these two are called by torch.tensor
    factories.impl("_local_scalar_dense", lambda x: _run(aten._local_scalar_dense.default, (x,), {}), "PrivateUse1")
    _libraries.extend([anything, factories])


def begin() -> None:
    """Count reads anew."""
    reads.clear()
    _seen["products"] = 0


def place(model: nn.Module) -> nn.Module:
    """Move a model to the device."""
    model.to(KIND)
    model.tie_weights()
    return model


class _Module(backend_registration._DummyBackendModule):
    """What torch.cuda is for CUDA, as far as it is asked for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _factories() -> list[Any]:
    """The operators that make a tensor on a device out of none."""
    found = []
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        name, _, overload = name.partition(".")
        op = getattr(getattr(aten, name, None), overload or "default", None) if namespace == "aten" else None
        arguments = () if op is None else op._schema.arguments
        takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
        if any(argument.name == "device" for argument in arguments) and not takes_tensors:
            found.append(op)
    return found


def _copy_from(source: Tensor, target: OnDevice, non_blocking: bool = False) -> OnDevice:
    target.held.copy_(source)
    return target


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on the numbers, if its tensors are where they must be."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else torch.device(asked).type == KIND
    if asked is not None and here:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is aten.copy_.default:
        _note_read(if_=not isinstance(args[0], OnDevice))
    elif func is not aten._to_copy.default and ours:
        _check_devices(func, args, tensors)
    _seen["products"] += func in PRODUCTS
    masks = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
    leaves = func is aten._local_scalar_dense.default or (func is aten._to_copy.default and ours and not here)
    _note_read(if_=leaves or masks or func in SIZES)
    out = func(*tree_map_only(OnDevice, lambda x: x.held, args), **tree_map_only(OnDevice, lambda x: x.held, kwargs))
    if not here:
        return out
    assert all(x.shape == x.held.shape for x in ours), f"{func} changes the shape of what it is given"
    known = {id(x.held): x for x in ours} if func._schema.is_mutable else {}
    return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnDevice(x), out)


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """As CUDA: numbers may be on the CPU, and what a tensor is indexed by."""
    by = tree_leaves(args[1]) if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) else ()
    strays = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim and not any(x is index for index in by)]
    if strays:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}, on the CPU {strays[0].shape}")


def _note_read(if_: bool = True) -> None:
    """The host waits for the device, which has something to do."""
    if not (if_ and _seen["products"]):
        return
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] not in ("triton_sp", "transformers"):
        frame = frame.f_back
    reads[frame.f_globals["__name__"] if frame else "a caller"] += 1
