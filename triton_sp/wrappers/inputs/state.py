"""What the models of all ranks must have in common before a step: names, shapes, dtypes and values of their weights,
which of them train, which layers are checkpointed.

Ranks whose models differ here do not differ in their batches, so nothing else would tell: with another random
initialisation they train the sum of two models, with a weight frozen on one rank only their gradients travel past each
other. Engines hand out weights after `wrap` (DDP and FSDP from rank 0), so all this is compared in a forward: in the
first, and in the first after something has changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

# Values of a parameter that are looked at. Where a part f of them differs, it is not noticed with probability
# (1 - f)^64: 1e-3 for 10 % of a parameter, 0.5 for 1 %. Another initialisation differs everywhere.
SAMPLES = 64
# The calls in which values are looked at beside those where something has changed: the first two, before and after the
# first step of the optimizer, and one in so many. With 700 parameters this takes about 15 ms.
EVERY = 100


@dataclass(eq=False)
class ModelState:
    """What was seen of a model when it was last looked at closely, and what of it is looked at in every call.

    Attributes:
        digest: of the lines, 12 hexadecimal digits.
        calls: how many calls of the model were looked at.
    """

    model: nn.Module
    digest: str = ""
    calls: int = 0
    values: str = ""
    _parameters: list[tuple[dict[str, Any], str, nn.Parameter]] = field(default_factory=list)
    _modules: list[tuple[nn.Module, int]] = field(default_factory=list)
    _flags: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model is looked at anew."""
        return {"model": self.model, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As after `wrap`."""
        self.__init__(**state)

    def look(self) -> str:
        """The digests of what must be equal on all ranks, before a forward."""
        before = self.digest
        structure = self.structure()
        if structure != before or self.calls < 2 or self.calls % EVERY == 0:
            self.values = _digest(self.value_lines())
        self.calls += 1
        return f"{structure} {self.values}"

    def structure(self) -> str:
        """The digest of everything but the values."""
        flags = self._look_at_flags()
        if flags is None or flags != self._flags:
            self._remember()
            self._flags = self._look_at_flags()
            self.digest = _digest(self.lines())
        return self.digest

    def details(self) -> list[str]:
        """What the digests are of, a line a parameter."""
        return self.lines() + self.value_lines()

    def lines(self) -> list[str]:
        """Everything but the values."""
        first: dict[int, str] = {}
        lines, flattened = [], self._is_flattened()
        for name, p in self.model.named_parameters(remove_duplicate=False):
            tied = first.setdefault(id(p), name)
            kind = "trained" if p.requires_grad else "frozen"
            shape = "a part" if flattened else tuple(getattr(p, "ds_shape", p.shape))  # ZeRO 3 leaves an empty tensor
            lines.append(f"{name}={shape} {str(p.dtype)[6:]}, {kind}{f', tied to {tied}' if tied != name else ''}")
        ways = {
            name or "the model": _way(module)
            for name, module in self.model.named_modules()
            if module.__dict__.get("gradient_checkpointing")
        }
        lines.append(f"gradient checkpointing={ways or 'off'}")
        return lines

    def value_lines(self) -> list[str]:
        """A digest of some values of each parameter that is whole on this rank."""
        whole = {name: p for name, p in self.model.named_parameters() if _is_whole(p)}
        if self._is_flattened():
            return []
        digests = _samples(list(whole.values()))
        return [f"values of {name}={digest}" for name, digest in zip(whole, digests, strict=True)]

    def _is_flattened(self) -> bool:
        """Whether FSDP 1 has made the parameters views of this rank's part."""
        return any("_is_fsdp_managed_module" in module.__dict__ for module in self.model.modules())

    def _remember(self) -> None:
        modules = list(self.model.modules())
        self._modules = [(module, len(module._modules)) for module in modules]
        self._parameters = [
            (m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None
        ]

    def _look_at_flags(self) -> Any:
        """Of each parameter whether it trains and its dtype, and which modules are checkpointed; None where a module or
        a parameter is another object than before."""
        if not self._modules or any(len(module._modules) != count for module, count in self._modules):
            return None
        if any(held.get(name) is not p for held, name, p in self._parameters):
            return None
        trained = tuple((p.requires_grad, p.dtype) for _, _, p in self._parameters)
        return trained, tuple(bool(module.__dict__.get("gradient_checkpointing")) for module, _ in self._modules)


def autocast_of(device: str) -> str:
    """The dtype that a kind of device is in autocast to, or "off".

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_of("cpu")
    'bfloat16'
    """
    return str(torch.get_autocast_dtype(device))[6:] if torch.is_autocast_enabled(device) else "off"


def _digest(lines: list[str]) -> str:
    return hashlib.blake2s("\n".join(lines).encode(errors="backslashreplace"), digest_size=6).hexdigest()


def _way(module: nn.Module) -> str:
    """How a module is checkpointed."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return f"{function.keywords}" if isinstance(function, partial) else "on"


def _is_whole(p: nn.Parameter) -> bool:
    return not (p.is_meta or hasattr(p, "ds_id") or hasattr(p, "to_local") or p.numel() == 0)


def _samples(parameters: list[nn.Parameter]) -> list[str]:
    """A digest of SAMPLES values of each parameter. There is one transfer from the device for each dtype."""
    picked: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for number, p in enumerate(parameters):
        taken = p.detach().reshape(1) if p.ndim == 0 else p.detach()[_places(p.shape, p.device)]
        picked.setdefault((p.dtype, p.device), []).append((number, taken))
    digests = [""] * len(parameters)
    for group in picked.values():
        flat = torch.cat([taken for _, taken in group]).cpu()
        for (number, _), part in zip(group, flat.split([len(taken) for _, taken in group]), strict=True):
            digests[number] = hashlib.blake2s(
                part.clone().view(torch.uint8).numpy().tobytes(), digest_size=6
            ).hexdigest()
    return digests


@lru_cache(1024)
def _places(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of SAMPLES places of a tensor, the same on every rank."""
    generator = torch.Generator().manual_seed(shape.numel())
    flat = torch.randint(shape.numel(), (min(SAMPLES, shape.numel()),), generator=generator)
    return tuple(index.to(device) for index in torch.unravel_index(flat, shape))
