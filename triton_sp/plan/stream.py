"""One token stream of one batch, as every rank of the group sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask
from triton_sp.ops.backends.choice import Choice
from triton_sp.plan.boxes import route
from triton_sp.plan.cost import PlanName
from triton_sp.plan.heads import assign_heads, assign_whole_heads, describe_tasks
from triton_sp.plan.recurrence import Carry, carry
from triton_sp.plan.route import CutHeads, HeadRoute, WholeHeads
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.ranks.groups import Group


@dataclass(frozen=True, eq=False)
class Stream:
    """One token stream of one batch, as every rank of the group sees it. Immutable, so that a recomputation in the
    backward reads what the forward read; what layers have in common is worked out once.

    Attributes:
        cu_seqlens: int32 (segments + 1,), the segments of the whole stream.
        seqused_k: int32 (segments,), or None where every token of a segment is a key of it. A padding position that
            carries a label is a segment of one row and no key.
        host_segments: the values of cu_seqlens, and the spans if there are any; None where the host does not have them:
            they are then read from the device when needed, once.
        plan: "segments" if shards end where segments end, of these layers or of others.
        chunks: heads are exchanged and attended to in so many parts, if they divide, one travelling while another is
            attended to.
        attention: who attends, where that is not always ours.
    """

    group: Group
    shards: Shards
    cu_seqlens: Tensor
    seqused_k: Tensor | None = None
    host_segments: Segments | None = None
    plan: PlanName = "heads"
    chunks: int = 1
    attention: Choice | None = None
    _masks: dict[tuple[range, range, bool, int | None], Mask] = field(default_factory=dict, repr=False)
    _ranges: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    _routes: dict[tuple[int, int, bool, int | None], HeadRoute] = field(default_factory=dict, repr=False)

    @cached_property
    def own(self) -> range:
        """This rank's tokens."""
        return self.shards.range(self.group.rank)

    @property
    def local(self) -> slice:
        """This rank's tokens, to index a tensor of the whole stream."""
        return slice(self.own.start, self.own.stop)

    @cached_property
    def segments(self) -> Segments:
        """The values of cu_seqlens; read from the device once, if the host does not have them."""
        return self.host_segments or Segments(tuple(self.cu_seqlens.tolist()))

    @cached_property
    def is_local(self) -> bool:
        """Whether every segment is one rank's, so that layers attend to what they have."""
        return self.group.size == 1 or (self.plan == "segments" and self.segments.local(self.shards))

    @cached_property
    def carry(self) -> Carry:
        """How this rank's tokens hang together with those of others in recurrent layers."""
        return carry(self.shards, self.segments, self.group.rank)

    def describe(self) -> str:
        """How the layers that have run attended on this rank."""
        if self.is_local:
            return "no exchange"
        tasks = {describe_tasks(route.tasks, self.shards.total) for route in self._routes.values()}
        return " or ".join(sorted(tasks))

    def route(self, num_heads: int, num_kv_heads: int, causal: bool, window: int | None) -> HeadRoute:
        """How layers with these heads and this mask exchange."""
        key = (num_heads, num_kv_heads, causal, window)
        if key not in self._routes:
            self._routes[key] = self._find_route(*key)
        return self._routes[key]

    def _find_route(self, num_heads: int, num_kv_heads: int, causal: bool, window: int | None) -> HeadRoute:
        ranks, rank = self.group.size, self.group.rank
        # Whole heads need not know the segments, which may still be on the device.
        whole = assign_whole_heads(num_heads, num_kv_heads, ranks, self.shards.total)
        if whole is not None:
            (task,) = whole[rank]
            return WholeHeads(self.shards, rank, whole[rank], self.mask(task.rows, task.keys, causal, window))
        tasks = assign_heads(num_heads, num_kv_heads, ranks, self.segments.work(causal, window))
        masks = [self.mask(task.rows, task.keys, causal, window) for task in tasks[rank]]
        return CutHeads(route(self.shards, tasks, rank), masks, self.cu_seqlens.device)

    def mask(self, rows: range, keys: range, causal: bool, window: int | None) -> Mask:
        """What some rows see of the keys that any of them sees. Nothing is read from the device."""
        key = (rows, keys, causal, window)
        if key not in self._masks:
            tables = self._tables(rows, keys)
            if causal and self.host_segments is not None and self.host_segments.spans:
                ranges = self._key_ranges(window)[:, rows.start : rows.stop]
                self._masks[key] = Mask(*tables, (ranges - keys.start).clamp(0, len(keys)), kept={})
            else:
                longest = None if self.host_segments is None else self._max_seqlens(rows, keys)
                self._masks[key] = Mask(*tables, None, causal, window, longest, kept={})
        return self._masks[key]

    def _max_seqlens(self, rows: range, keys: range) -> tuple[int, int]:
        """How many of some rows, and how many of their keys, the segment has that has most of them."""
        touched = self.segments.within(rows)
        bounds = self.segments.table[touched.start : touched.stop + 1]
        longest_q, longest_k = (
            int(np.diff(bounds.clip(part.start, part.stop)).max(initial=0)) for part in (rows, keys)
        )
        return longest_q, longest_k

    def _key_ranges(self, window: int | None) -> Tensor:
        """int32 (2, S), the keys that each row sees in layers with this window: see `Mask.key_ranges`."""
        if window not in self._ranges:
            segments, row = self.segments, torch.arange(self.shards.total)
            starts = torch.tensor(segments.starts)
            first, stop = starts[:-1].repeat_interleave(starts.diff()), row + 1
            if window is not None:
                first = first.maximum(row - window + 1)
            for span in segments.spans:
                stop[span.start : span.stop] = span.stop
                if not segments.cut_spans:
                    first[span.start : span.stop].clamp_(max=span.start)
            self._ranges[window] = torch.stack([first, stop]).to(self.cu_seqlens.device, torch.int32)
        return self._ranges[window]

    def _tables(self, rows: range, keys: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """cu_seqlens_q, cu_seqlens_k and seqused_k of some rows and keys."""
        if len(rows) == len(keys) == self.shards.total:
            return self.cu_seqlens, self.cu_seqlens, self.seqused_k
        touched = self.segments.within(rows)
        bounds = self.cu_seqlens[touched.start : touched.stop + 1]
        cu_q, cu_k = ((bounds - part.start).clamp(0, len(part)) for part in (rows, keys))
        if self.seqused_k is None:
            return cu_q, cu_k, None
        return cu_q, cu_k, self.seqused_k[touched.start : touched.stop].minimum(cu_k.diff())


def chunks(wanted: int, num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """In how many chunks of heads a layer is done: at most as many as wanted, each of whole heads for all ranks.

    >>> chunks(4, 16, 16, 2), chunks(3, 16, 16, 2), chunks(4, 28, 4, 4)
    (4, 2, 1)
    """
    fit = [n for n in range(2, wanted + 1) if num_kv_heads % n == 0 and num_kv_heads // n % ranks == 0]
    return max(fit, default=1)
