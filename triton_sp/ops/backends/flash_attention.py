"""The packages of FlashAttention: flash-attn 2 and FlashAttention 3, installed or from the Hub.

An installed package is taken first. Without one the `kernels` package, where that is installed, loads a build from the
Hugging Face Hub. Both have the same Python functions, which are called below autograd, by the names of their arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_sp.ops.backends.adapter import Adapter, Call, Results

Function = Callable[..., Any]


class Missing(Exception):
    """A package that is not there, or is too old."""


def load(modules: tuple[str, ...], repository: str, version: int, names: tuple[str, str]) -> tuple[Function, Function]:
    """The forward and the backward of the first module that can be imported, or of a repository of the Hub.

    Raises:
        Missing: none is there, or it has no such functions.
    """
    for name in modules:
        try:
            interface = importlib.import_module(name)
            break
        except ModuleNotFoundError:
            continue
        except Exception as error:  # whatever a compiled extension raises at import: of another torch, say
            raise Missing(f"{name} cannot be imported: {error}"[:300]) from error
    else:
        interface = _from_hub(modules, repository, version)
    forward, backward = (getattr(interface, name, None) for name in names)
    if forward is None or backward is None:
        raise Missing(f"{interface.__name__} has no {' or '.join(names)}")
    return forward, backward


def _from_hub(modules: tuple[str, ...], repository: str, version: int) -> Any:
    try:
        kernels: Any = importlib.import_module("kernels")
    except ModuleNotFoundError:
        raise Missing(f"neither {modules[0]} nor the kernels package is installed") from None
    try:
        found = kernels.get_kernel(repository, version=version)
    except Exception as error:  # of the network, the Hub, or a build for another torch
        raise Missing(f"{repository} cannot be loaded: {error}"[:300]) from error
    return getattr(found, "flash_attn_interface", found)


def parameters(function: Function) -> dict[str, bool]:
    """The arguments of a function, also of one that is registered as an operator, and whether each must be given.

    >>> parameters(lambda q, window_size=(-1, -1): q)
    {'q': True, 'window_size': False}
    """
    found = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: parameter.default is parameter.empty for name, parameter in found.items()}


class FlashAttention(Adapter):
    """What both packages have in common.

    Attributes:
        source: what `load` is given.
        needed: arguments of the forward that older versions do not have, any one of a group.
    """

    source: ClassVar[tuple[tuple[str, ...], str, int, tuple[str, str]]]
    needed: ClassVar[tuple[str, ...]]

    @functools.cached_property
    def functions(self) -> tuple[Function, Function]:
        """The forward and the backward. Raises `Missing`."""
        found = load(*self.source)
        if not any(name in parameters(found[0]) for name in self.needed):
            raise Missing(f"{found[0].__module__} is too old: {found[0].__name__} takes no {self.needed[0]}")
        return found

    @functools.cached_property
    def arguments(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """The arguments of the two, and whether they must be given."""
        forward, backward = self.functions
        return parameters(forward), parameters(backward)

    def absent(self) -> str:
        """Why the package cannot be used, or ""."""
        try:
            self.functions  # noqa: B018
        except Missing as error:
            return str(error)
        return ""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """By the package's own forward, below its autograd function."""
        q, k, v = call[:3]
        out, lse, *_ = self._run(0, call, q=q, k=k, v=v)
        return out, lse

    def backward(self, call: Call, results: Results, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """By the package's own backward, which writes to the tensors that it is given."""
        q, k, v = call[:3]
        dq, dk, dv = grads
        dout, out, lse = results
        self._run(1, call, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv)

    def _run(self, direction: int, call: Call, **tensors: Tensor) -> Any:
        (left, right), (rows, keys) = call.reach, call.max_seqlens
        cu_seqlens_q, cu_seqlens_k, *_ = call.mask.tables
        settings: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": rows,
            "max_seqlen_k": keys,
            "softmax_scale": call.softmax_scale,
            "causal": call.mask.causal,
            "is_causal": call.mask.causal,
            "window_size_left": left,
            "window_size_right": right,
            "window_size": (left, right),
            "softcap": call.softcap,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dropout_p": 0.0,
            **tensors,
        }
        # What a version does not know is left out: some settings have two names. What it must be given else is None.
        known = self.arguments[direction]
        return self.functions[direction](
            **{name: settings.get(name) for name, needed in known.items() if needed or name in settings}
        )


class FlashAttention2(FlashAttention):
    """flash-attn from 2.7 on (arXiv:2307.08691)."""

    name = "flash_attention_2"
    source = (
        ("flash_attn.flash_attn_interface",),
        *("kernels-community/flash-attn2", 4),
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    )
    needed = ("window_size_left",)


class FlashAttention3(FlashAttention):
    """FlashAttention 3 (arXiv:2407.08608), for Hopper. Before its last betas `window_size` was a pair."""

    name = "flash_attention_3"
    source = (
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        *("kernels-community/flash-attn3", 1),
        ("_flash_attn_forward", "_flash_attn_backward"),
    )
    needed = ("window_size_left", "window_size")
