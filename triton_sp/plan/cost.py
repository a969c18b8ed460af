"""Which plan is the fastest: an alpha-beta model of one training step of a stack of layers. Pure Python, no measuring,
so that every rank comes to the same answer from what every rank knows.

heads      equal shards, two exchanges a layer: the work divides whatever the segments are
segments   shards that end where segments end: no exchange in these layers, as even as the segments allow
replicate  every rank computes the whole stream: no exchange at all, for streams too small to be worth one

Where some layers of a tower attend in windows and others in whole images, shards that end where windows end serve
both: the windowed layers exchange nothing, the others exchange heads (see Stream.is_local).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from triton_sp import cache
from triton_sp.errors import InputError
from triton_sp.plan.segments import Segments, shard_segments
from triton_sp.plan.shards import Shards, shard_tokens

PlanName = Literal["heads", "segments", "replicate"]


@dataclass(frozen=True)
class Link:
    """What moves between ranks, and what a rank computes.

    Attributes:
        latency: seconds that a collective takes beside its bytes (alpha).
        bandwidth: bytes a second that a rank sends to the others (1 / beta).
        compute: FLOP a second that a rank reaches in training.
    """

    name: str
    latency: float
    bandwidth: float
    compute: float


# Estimates, not measurements of this project; `triton-sp calibrate` measures and stores what holds on a machine.
LINKS = {
    "nvlink": Link("nvlink", 30e-6, 350e9, 400e12),
    "pcie": Link("pcie", 50e-6, 20e9, 150e12),
    "gloo": Link("gloo", 300e-6, 1e9, 30e9),
}


def find_link(name: str, device: str, ranks: int) -> Link:
    """The link by name; for "auto" the calibrated one, or the default of the device type ("cpu" or "cuda").

    Raises:
        InputError: the file that holds what was measured on this machine is damaged.

    >>> find_link("pcie", "cuda", 8).bandwidth
    20000000000.0
    """
    if name != "auto":
        return LINKS[name]
    return _calibrated(cache.cache_file(f"link-{device}-{ranks}")) or LINKS["gloo" if device == "cpu" else "nvlink"]


@functools.cache
def _calibrated(path: Path) -> Link | None:
    """What was measured, read once in a process, because each forward asks several times; None if nothing was."""
    try:
        link = Link(**cache.load(path))
        if min(link.latency, link.bandwidth, link.compute) > 0:
            return link
        found = str(link)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise InputError(
        str(path),
        expected="a link with positive numbers, as triton-sp calibrate writes it",
        found=found,
        remedy="delete the file, or run triton-sp calibrate again",
    )


def store_link(link: Link, device: str, ranks: int) -> Path:
    """Keep a measured link for `find_link`, for this type of device and size of group, and say where."""
    file = cache.store(cache.cache_file(f"link-{device}-{ranks}"), asdict(link))
    _calibrated.cache_clear()
    return file


@dataclass(frozen=True)
class Layers:
    """A stack of equal layers, as the cost model sees them.

    Attributes:
        count: how many.
        width: channels of the hidden states; a layer's weights are taken as 12 width^2, those of a transformer block
            whose MLP is 4 times as wide.
        q, kv, head_dim: channels of the queries, of the keys, and of a head.
        itemsize: bytes of a number.
    """

    count: int
    width: int
    q: int
    kv: int
    head_dim: int
    itemsize: int
    causal: bool = False

    def token_flops(self) -> float:
        """Of a token in one layer, forward (2 a weight) and backward (4), without attention."""
        return 72.0 * self.width**2

    def pair_flops(self) -> float:
        """Of a (row, key) pair in all heads of one layer: two products forward, five backward."""
        return 14.0 * self.q

    def exchange_bytes(self, tokens: int, ranks: int) -> float:
        """That a rank with so many tokens sends in one layer, forward: q and outputs, k and v at least once a rank."""
        kv = max(self.kv, ranks * self.head_dim)
        return tokens * (2 * self.q + 2 * kv) * self.itemsize * (ranks - 1) / ranks


@dataclass(frozen=True)
class PlanChoice:
    """The plan of a stream: its name, its shards, why, the modelled seconds of a step for each candidate, and in how
    many chunks heads are exchanged."""

    plan: PlanName
    shards: Shards
    why: str
    seconds: dict[str, float]
    chunks: int = 1


def choose_plan(
    segments: Segments,
    ranks: int,
    unit: int,
    layers: Layers,
    link: Link,
    forced: str,
    replicable: bool,
    owned: Shards | None = None,
) -> PlanChoice:
    """The plan for a stream.

    Args:
        segments: those of the layers that run first; shards are cut where they end, or evenly.
        unit: neighbouring tokens that must stay together.
        forced: a plan's name, or "auto".
        replicable: whether every rank may compute all of it.
        owned: a cut where segments end that leaves ranks without any, for where there are fewer segments than ranks.

    >>> frames = Segments(tuple(range(0, 65 * 1024, 1024)))
    >>> tower = Layers(count=27, width=1152, q=1152, kv=1152, head_dim=72, itemsize=2)
    >>> choose_plan(frames, 8, 4, tower, LINKS["nvlink"], "auto", True).plan
    'segments'
    >>> choose_plan(Segments((0, 65536)), 8, 4, tower, LINKS["nvlink"], "auto", True).plan
    'heads'
    >>> choose_plan(Segments((0, 64)), 8, 4, tower, LINKS["nvlink"], "auto", True).plan
    'replicate'
    """
    work = segments.work(layers.causal)
    total = segments.starts[-1]
    flops = np.diff(segments.table) * layers.token_flops() + work.by_segment * layers.pair_flops()

    even, cut = shard_tokens(total, ranks, unit), shard_segments(segments, ranks, flops, unit) or owned
    # A tower's result is made whole again at its end: one more collective, of hidden states.
    end = 2 * (link.latency + total * layers.width * layers.itemsize * (ranks - 1) / ranks / link.bandwidth)
    busiest = max(even.sizes) * layers.token_flops() + work.total * layers.pair_flops() / ranks
    exchanged = layers.exchange_bytes(max(even.sizes), ranks) / link.bandwidth
    seconds = {"heads": layers.count * (busiest / link.compute + 4 * link.latency + 2 * exchanged) + end}
    if cut is not None:
        before = np.concatenate([np.zeros(1), np.cumsum(flops)])
        edges = np.searchsorted(segments.table, [*cut.starts, total])  # cuts are where segments end
        loads = np.diff(before[edges])
        seconds["segments"] = layers.count * float(loads.max()) / link.compute + end
    if replicable:
        seconds["replicate"] = layers.count * float(flops.sum()) / link.compute
    if min(even.sizes) == 0 and replicable:
        del seconds["heads"]  # a rank without tokens

    best = min(seconds, key=lambda name: seconds[name])
    modelled = ", ".join(f"{name} {time * 1e3:.3g} ms" for name, time in seconds.items())
    why = f"fastest by the model of {link.name} ({modelled} a step)"
    if forced in seconds:
        best, why = forced, "as SPConfig.plan says"
    elif forced != "auto":
        why = f"SPConfig.plan={forced!r} is not possible here; {why}"
    shards = {"heads": even, "segments": cut, "replicate": Shards((total,))}[best]
    assert shards is not None
    return PlanChoice(best, shards, why, seconds)  # type: ignore[arg-type]
