"""Which plan is the fastest, by an alpha-beta model of one training step of a stack of layers.

heads      shards of equal size and two exchanges in each layer; work divides evenly whatever the segments are
segments   shards that end where segments end; no exchange in these layers, but only as even as the segments allow
replicate  every rank computes the whole stream; no exchange at all, for streams that are too small for one

If some layers of a tower attend in windows and others in whole images, shards that end where windows end serve both:
the layers with windows exchange nothing, and the others exchange heads (see Stream.is_local). Nothing is measured here,
so every rank comes to the same answer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from triton_sp import cache
from triton_sp.errors import InputError
from triton_sp.ops.backends.choice import Choice
from triton_sp.plan.segments import Segments, shard_segments
from triton_sp.plan.shards import Shards, shard_tokens

PlanName = Literal["heads", "segments", "replicate"]


@dataclass(frozen=True)
class Link:
    """How fast ranks send and compute.

    Attributes:
        name: for messages.
        latency: seconds that a collective takes in addition to its bytes (alpha).
        bandwidth: bytes per second that a rank sends to the others (1 / beta).
        compute: FLOP per second that a rank reaches in training.
    """

    name: str
    latency: float
    bandwidth: float
    compute: float


# Estimates, not measurements. `triton-sp calibrate` measures a machine and stores the result.
LINKS = {
    "nvlink": Link("nvlink", 30e-6, 350e9, 400e12),
    "pcie": Link("pcie", 50e-6, 20e9, 150e12),
    "gloo": Link("gloo", 300e-6, 1e9, 30e9),
}


def find_link(name: str, device: str, ranks: int) -> Link:
    """The link of a name. For "auto" it is the measured one, or else the default of the device type.

    Args:
        name: a key of LINKS, or "auto".
        device: "cpu" or "cuda".
        ranks: the size of the group.

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
        numbers = (link.latency, link.bandwidth, link.compute)
        if all(type(x) in (int, float) and 0 < x < math.inf for x in numbers) and isinstance(link.name, str):
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
    """A stack of equal layers, as the cost model sees it.

    Attributes:
        count: how many layers.
        width: channels of the hidden states. A layer is assumed to have 12 width^2 weights, those of a transformer
            block whose MLP is 4 times as wide.
        q, kv, head_dim: channels of the queries, of the keys, and of one head.
        itemsize: bytes of a number.
        causal: whether attention is.
    """

    count: int
    width: int
    q: int
    kv: int
    head_dim: int
    itemsize: int
    causal: bool = False

    def token_flops(self) -> float:
        """FLOPs of a token in one layer without attention: 2 for each weight in the forward and 4 in the backward."""
        return 72.0 * self.width**2

    def pair_flops(self) -> float:
        """FLOPs of a (row, key) pair in all heads of a layer: two products in the forward and five in the backward."""
        return 14.0 * self.q

    def exchange_bytes(self, tokens: int, ranks: int) -> float:
        """Bytes that a rank with these tokens sends in the forward of one layer: q, outputs, k and v.

        Each rank needs at least one key/value head, so with more ranks than heads k and v are sent several times.
        """
        kv = max(self.kv, ranks * self.head_dim)
        return tokens * (2 * self.q + 2 * kv) * self.itemsize * (ranks - 1) / ranks


@dataclass(frozen=True)
class PlanChoice:
    """The plan of a stream.

    Attributes:
        plan: its name.
        shards: who owns which tokens.
        why: the reason, for `explain`.
        seconds: the modelled time of a step with each candidate.
        chunks: in how many parts heads are exchanged.
        attention: who attends, where that is not always ours.
    """

    plan: PlanName
    shards: Shards
    why: str
    seconds: dict[str, float]
    chunks: int = 1
    attention: Choice | None = None


@functools.lru_cache(maxsize=8)
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
    """The plan for a stream. The last ones are kept: steps repeat, above all images and windows of one size.

    Args:
        segments: the segments of the layers that run first. Shards are cut where these end, or evenly.
        ranks: the size of the group.
        unit: how many neighbouring tokens must stay together.
        layers: the stack.
        link: how fast ranks send and compute.
        forced: the name of a plan, or "auto".
        replicable: whether every rank may compute the whole stream.
        owned: the cut to use for "segments" if there are fewer segments than ranks; some ranks have no tokens then.

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
    # The result of a tower is gathered at its end: one more collective, of hidden states.
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
        del seconds["heads"]  # a rank would have no tokens

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
