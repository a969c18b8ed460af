"""What this machine has found out about implementations of attention: `triton-sp calibrate` writes it, "auto" reads it.

The record is a JSON file in the user's cache. It holds for one kind of device and the versions that were measured; no
record, or one of another environment, means ours.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import torch

from triton_sp import cache
from triton_sp._version import __version__
from triton_sp.errors import InputError
from triton_sp.ops.backends.adapter import Call, Direction

GAIN = 1.1  # how many times as fast as ours another must be
KIND = "attention"  # of the files
PACKAGES = ("triton", "flash-attn", "flash-attn-3", "kernels")


class Finding(NamedTuple):
    """One implementation, in one direction, at one head dim, causal or not.

    Attributes:
        wrong: how it differs from attention in fp32, or ""; then it was not timed.
        ours, theirs: seconds of a call.
    """

    name: str
    direction: Direction
    dim: int
    causal: bool
    wrong: str
    ours: float
    theirs: float

    @property
    def gain(self) -> float:
        """How many times as fast as ours it is; 0 where it is wrong.

        >>> Finding("torch", "forward", 64, True, "", 3e-3, 2e-3).gain
        1.5
        """
        return 0.0 if self.wrong else self.ours / self.theirs

    def __str__(self) -> str:
        what = f"{self.name} {self.direction}, head dim {self.dim}{', causal' * self.causal}"
        return f"{what}: {self.wrong or f'{self.gain:.2f} times as fast as ours'}"


def machine(kind: str) -> dict[str, str]:
    """What a record holds for: a change in any of these calls for new measurements."""
    found = {"device": torch.cuda.get_device_name() if kind == "cuda" else kind}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found | {"torch": torch.__version__, "triton_sp": __version__}


def store(kind: str, findings: list[Finding]) -> Path:
    """Keep what was found on a kind of device ("cuda" or "cpu"), and say where."""
    where = machine(kind)
    file = cache.store(cache.file_for(KIND, where), {"machine": where, "findings": findings})
    gains.cache_clear()
    return file


@functools.cache
def gains(kind: str) -> dict[tuple[Direction, int, bool], tuple[str, ...]]:
    """The implementations that are enough faster than ours, the fastest first. Read once in a process.

    Raises:
        InputError: the file is damaged.
    """
    where = machine(kind)
    path = cache.file_for(KIND, where)
    try:
        findings = [Finding(*entry) for entry in cache.load(path)["findings"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            str(path),
            expected="what triton-sp calibrate has written",
            found=f"{type(error).__name__}: {error}",
            remedy="delete the file, or run triton-sp calibrate again",
        ) from error
    found: dict[tuple[Direction, int, bool], tuple[str, ...]] = {}
    for finding in sorted(findings, key=lambda finding: -finding.gain):
        if finding.gain >= GAIN:
            key = (finding.direction, finding.dim, finding.causal)
            found[key] = (*found.get(key, ()), finding.name)
    return found


def faster(direction: Direction, call: Call) -> tuple[str, ...]:
    """The names of what is recorded as correct and faster than ours for such a call, the fastest first."""
    return gains(call.q.device.type).get((direction, call.q.shape[2], call.mask.causal), ())
