"""The trial of the norms of heads of q and k, before they are rotated: whether the pack computes them too.

They are found by what they have made: the very rows of memory that the rotating function was given, not written since.
Of random rows, some as small as the root of eps, and a random weight, in float32 or wider, they must then make what
`ops.reference.normalise` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from triton_sp.ops.reference import Norm, normalise
from triton_sp.wrappers.install import Override
from triton_sp.wrappers.layers.rotation_trial import version

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OFFSETS = (0.0, 1.0)  # Gemma's weights are trained as differences from 1


class Made(NamedTuple):
    """A call of what may be a norm: what it was given and has made, and how often that had been written."""

    module: nn.Module
    given: Tensor
    made: Tensor
    version: int

    def why_not(self, dim: int) -> str:
        """What is wrong, where v has heads of this dim."""
        if version(self.made) != self.version or self.given.shape != self.made.shape:
            return "q or k is changed after it is normalised"
        return "" if self.made.shape[-1] == dim else "heads of v are of another dim"


@dataclass(frozen=True)
class HeadNorms:
    """The norms of q and k among the children of an attention module.

    Attributes:
        names: of that of q and that of k.
        kind: their class, and the forward that it had.
    """

    names: tuple[str, str]
    kind: tuple[Any, Any]
    eps: float
    offset: float

    def of(self, module: nn.Module) -> tuple[Any, ...]:
        """Those of an attention module; none where they would do something else now."""
        found: tuple[Any, ...] = tuple(getattr(module, name) for name in self.names)
        return found if all((type(x), type(x).forward) == self.kind and not why_not(x) for x in found) else ()

    def of_weights(self, norms: Sequence[Any]) -> Norm:
        """What the pack is told."""
        q, k = norms
        return Norm((q.weight, k.weight), self.eps, self.offset)


def may_be_norm(module: nn.Module) -> bool:
    """Whether all that a module has is one weight, a number for each of a head's."""
    own = dict(module.named_parameters())
    return list(own) == ["weight"] and own["weight"].ndim == 1 and not list(module.buffers())


def why_not(norm: nn.Module) -> str:
    """Why a norm cannot be left out of its module's forward: something would see that, or miss it."""
    forward = norm.__dict__.get("forward")
    override, weight = getattr(forward, "__self__", None), norm.weight
    if not isinstance(override, Override) or forward != override.__call__ or override.shadowed is not None:
        return "its forward is another's"
    if any(getattr(norm, name) for name in _HOOKS) or hooks._has_any_global_hook():  # pyright: ignore[reportPrivateUsage]
        return "it has hooks"
    return "" if type(weight) in (nn.Parameter, Tensor) else f"its weight is a {type(weight).__name__}"


def try_norms(module: nn.Module, calls: Sequence[Made], given: Sequence[Tensor], dim: int) -> tuple[Any, str]:
    """The `HeadNorms` of a module, or why its norms stay the model's own code; neither where there are none.

    Args:
        calls: of its children that may be norms, in one run; `given` of the function that rotates, q and k.
        dim: of the heads of v.
    """
    found = [[call for call in calls if is_rows(call.made, x)] for x in given]
    if not any(found):
        return None, ""
    if [len(x) for x in found] != [1, 1]:
        return None, "not of q and k alike"
    form, other = (_form(call, dim) for (call,) in found)
    kind, eps, offset, why = form
    if why or form != other:
        return None, why or other[3] or "not of one kind"
    names = {id(child): name for name, child in module.named_children()}
    q, k = (names[id(call.module)] for (call,) in found)
    return HeadNorms((q, k), (kind, kind.forward), eps, offset), ""


def _form(call: Made, dim: int) -> tuple[Any, float, float, str]:
    """The class, eps and offset of a norm, or why it has none that is known."""
    kind, numbers = type(call.module), [x for x in vars(call.module).values() if isinstance(x, float)]
    eps = numbers[0] if len(numbers) == 1 else 0.0
    if why := why_not(call.module) or call.why_not(dim) or ("" if eps else f"{kind.__name__} has no one eps"):
        return kind, eps, 0.0, why
    offset = next((x for x in OFFSETS if _compare(call, eps, x)), None)
    return kind, eps, offset or 0.0, f"{kind.__name__} computes in another way or precision" if offset is None else ""


def _compare(call: Made, eps: float, offset: float) -> bool:
    """Whether a module makes of random rows what the pack would make."""
    generator = torch.Generator().manual_seed(0)  # the program's own stays as it is
    wide, dim = torch.promote_types(call.given.dtype, torch.float32), call.given.shape[-1]
    few = [min(2, size) for size in call.given.shape[:-1]]
    random = (torch.randn(*shape, dim, generator=generator, dtype=wide) for shape in (few, []))
    x, weight = (numbers.to(call.given.device) for numbers in random)
    norm = Norm((weight, weight), eps, offset)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for rows in (x, x * eps**0.5):
            try:
                made = torch.func.functional_call(call.module, {"weight": weight}, (rows,))
            except Exception:  # a module of anybody's
                return False
            ours, near = normalise(rows, weight, norm), 16 * torch.finfo(wide).eps
            if made.shape != ours.shape or not torch.allclose(made.to(wide), ours, rtol=near, atol=near):
                return False
    return True


def is_rows(x: Tensor, of: Tensor) -> bool:
    """Whether two tensors are the same rows in memory, in any order: heads and tokens may have changed places."""
    same = x.data_ptr() == of.data_ptr() and x.dtype == of.dtype and x.shape[-1:] == of.shape[-1:]
    axes = [sorted(axis for axis in zip(y.stride(), y.shape, strict=True) if axis[1] > 1) for y in (x, of)]
    return same and x.stride()[-1:] == of.stride()[-1:] and axes[0] == axes[1]
