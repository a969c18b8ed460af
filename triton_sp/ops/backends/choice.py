"""Which implementation attends in a call: by the name in `SPConfig.attention`, in each direction by itself.

What the chosen one does not take runs on ours, and `explain` tells. "auto" takes another than ours only where the
record of this machine says that it is correct and faster, see verdict.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from triton_sp.errors import InputError
from triton_sp.ops.backends import verdict
from triton_sp.ops.backends.adapter import Adapter, Call, Direction
from triton_sp.ops.backends.flash_attention import FlashAttention2, FlashAttention3
from triton_sp.ops.backends.torch_kernels import Cudnn, TorchFlash

OURS, AUTO = "triton", "auto"


@functools.cache
def adapters() -> dict[str, Adapter]:
    """All that there are, by name; whether one can be used it says itself."""
    return {adapter.name: adapter for adapter in (TorchFlash(), Cudnn(), FlashAttention2(), FlashAttention3())}


def require(name: str) -> None:
    """Check that a chosen implementation can be used, before a model is changed.

    Raises:
        InputError: it is not installed.
    """
    reason = "" if name in (OURS, AUTO) else adapters()[name].absent()
    if reason:
        raise InputError(
            "SPConfig.attention",
            expected=f"an environment that has {name}",
            found=reason,
            remedy='install it, or choose attention="triton"',
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """Who attends in the layers of a stream.

    Attributes:
        name: as in `SPConfig.attention`.
        ran: who has attended so far, and why ours has where another was chosen, in words.
    """

    name: str
    ran: set[str] = field(default_factory=set)

    def pick(self, direction: Direction, call: Call) -> Adapter | None:
        """The adapter for a call, or None for ours."""
        reason = "no other is recorded as correct and faster"
        for name in verdict.faster(direction, call) if self.name == AUTO else (self.name,):
            adapter = adapters()[name]
            reason = adapter.obstacle(direction, call)
            if not reason:
                self.ran.add(f"{direction} by {name}")
                return adapter
        self.ran.add(f"{direction} by ours ({reason})")
        return None
