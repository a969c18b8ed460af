"""Implementations of attention from elsewhere, played by the reference, which record how they are called."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask
from triton_sp.ops import attend_cpu
from triton_sp.ops.backends import choice
from triton_sp.ops.backends.adapter import Adapter, Call, Results

SIGNATURES = json.loads((Path(__file__).parents[1] / "data" / "flash_attention_signatures.json").read_text())


class StandIn(Adapter):
    """Takes what a GPU's implementation takes, but on the CPU and in any dtype."""

    name = "torch"
    devices = ("cpu",)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)

    def __init__(self, off: float = 0.0, only: str = "") -> None:
        self.off, self.only, self.calls = off, only, []

    def absent(self) -> str:
        return ""

    def obstacle(self, direction: Any, call: Call) -> str:
        if self.only not in ("", direction):
            return f"{self.name} has no {direction}"
        return super().obstacle(direction, call)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        self.calls.append(("forward", call))
        out, lse = attend_cpu.attend(*call[:4], softmax_scale=call.softmax_scale, softcap=call.softcap)
        return out + self.off, lse

    def backward(self, call: Call, results: Results, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        self.calls.append(("backward", call))
        states, factors = (*call[:3], *results[1:]), {"softmax_scale": call.softmax_scale, "softcap": call.softcap}
        attend_cpu.attend_backward(results.dout, None, states, call.mask, **factors, grads=grads)


def installed(**adapters: Adapter) -> Any:
    """With these in the place of all that there are."""
    return mock.patch.object(choice, "adapters", lambda: adapters)


def packaged(name: str, version: str) -> tuple[SimpleNamespace, list[dict[str, Any]]]:
    """A module with the functions of a version of a package, as they are declared there, and the calls they got."""
    forward, backward = SIGNATURES[name][version]
    calls: list[dict[str, Any]] = []

    def declared(name: str, names: str, run: Callable[..., Any]) -> Callable[..., Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [
                inspect.Parameter(x.rstrip("="), kind, default=None if x.endswith("=") else inspect.Parameter.empty)
                for x in names.split()
            ]
        )

        def function(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments  # raises as the real one would
            calls.append(given)
            return run(given)

        function.__signature__, function.__name__ = signature, name  # type: ignore[attr-defined]
        return function

    functions = SIGNATURES[name][version]
    return SimpleNamespace(
        __name__=name,
        **{
            forward: declared(forward, functions[forward], _forward),
            backward: declared(backward, functions[backward], _backward),
        },
    ), calls


def _mask(given: dict[str, Any]) -> Mask:
    left, right = given["window_size"] if "window_size" in given else (
        given["window_size_left"], given["window_size_right"]
    )  # fmt: skip
    causal = bool(given.get("causal") or given.get("is_causal"))
    assert right == (0 if causal else left)
    lengths = [given[f"cu_seqlens_{x}"].diff().max().item() for x in "qk"]
    assert lengths == [given["max_seqlen_q"], given["max_seqlen_k"]]
    window = None if left == -1 else left + 1
    return Mask(given["cu_seqlens_q"], given["cu_seqlens_k"], causal=causal, window=window)


def _factors(given: dict[str, Any]) -> dict[str, float]:
    assert not given.get("dropout_p") and given.get("alibi_slopes") is None
    return {"softmax_scale": given["softmax_scale"], "softcap": given["softcap"]}


def _forward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    out, lse = attend_cpu.attend(given["q"], given["k"], given["v"], _mask(given), **_factors(given))
    return out, lse, torch.empty(0), torch.empty(0)


def _backward(given: dict[str, Any]) -> Tensor:
    states = tuple(given[name] for name in ("q", "k", "v", "out", "softmax_lse"))
    grads = tuple(given[name] for name in ("dq", "dk", "dv"))
    attend_cpu.attend_backward(given["dout"], None, states, _mask(given), **_factors(given), grads=grads)
    return torch.empty(0)
