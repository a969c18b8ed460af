"""How the layers of one stream exchange: what is packed for whom, where it lies on arrival, and the way back.

Each method has its adjoint beside it, which runs in the backward. Two classes with one face: `WholeHeads` where heads
divide between the ranks, so that every buffer is a stream or a view of one, and `CutHeads` where they do not.

    forward     pack -> (exchange) -> states, attend -> join -> (exchange) -> unpack
    backward    unpack_gradients <- (exchange) <- places, attend <- split <- (exchange) <- pack_gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from triton_sp.kernels.mask import Mask, Rotation, States
from triton_sp.ops import pack
from triton_sp.plan.boxes import Buffer, Route
from triton_sp.plan.heads import Tasks
from triton_sp.plan.shards import Shards


class WholeHeads:
    """Every rank attends with whole heads of the whole stream: one task, no table, nothing is copied on arrival.

    Sources arrive in rank order and shards are contiguous, so that the receive buffer, token by token, is the stream.

    Attributes:
        tasks: the heads, and rows of them, that this rank attends with; `masks` has the mask of each.
        sent, received: how many vectors go to, and come from, each rank in the first exchange. The second one sends
            `returned` and gets `results`. The exchanges of the backward run the other way.
    """

    def __init__(self, shards: Shards, rank: int, tasks: Tasks, mask: Mask) -> None:
        (self.task,) = self.tasks = tasks
        self.masks = (mask,)
        self.ranks, own = len(shards.sizes), shards.sizes[rank]
        self.counts = [len(self.task.q), len(self.task.kv), len(self.task.kv)]
        slot = sum(self.counts)
        self.sent, self.received = (own * slot,) * self.ranks, tuple(size * slot for size in shards.sizes)
        self.returned = tuple(size * len(self.task.q) for size in shards.sizes)
        self.results = (own * len(self.task.q),) * self.ranks

    def pack(self, states: States, rotation: Rotation | None = None) -> Tensor:
        """This rank's q, k and v (T, heads, D), q and k as `rotation` says, as the send buffer (vectors, D)."""
        return pack.pack_heads(states, self.ranks, rotation)

    def unpack_gradients(self, flat: Tensor, grads: States, rotation: Rotation | None = None) -> Tensor | None:
        """The adjoint of `pack`, written to `grads`; what `pack.unpack_heads` returns."""
        return pack.unpack_heads(flat, grads, self.ranks, rotation and rotation.adjoint)

    def states(self, received: Tensor) -> list[States]:
        """q, k and v of each task, from the receive buffer."""
        q, k, v = received.view(len(self.task.rows), sum(self.counts), -1).split(self.counts, 1)
        return [(q, k, v)]

    def places(self, received: Tensor) -> tuple[Tensor, list[States]]:
        """Where the gradients of `states` are to be written, and before that the buffer behind all of these places."""
        buffer = received.new_empty(received.shape)
        return buffer, self.states(buffer)

    def join_gradients(self, buffer: Tensor, places: list[States]) -> Tensor:
        """The adjoint of `states`: what the second exchange of the backward sends."""
        return buffer

    def join(self, outs: list[Tensor], like: Tensor) -> Tensor:
        """The tasks' outputs as the send buffer of the second exchange; `like` is a buffer of their dtype and width."""
        return outs[0].flatten(0, 1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The adjoint of `join`: the gradient of each task's output."""
        return [flat.view(len(self.task.rows), len(self.task.q), -1)]

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        """This rank's outputs (T, H, D), written to `out`."""
        pack.unpack_heads(flat, [out], self.ranks)

    def pack_gradients(self, dout: Tensor) -> Tensor:
        """The adjoint of `unpack`."""
        return pack.pack_heads([dout], self.ranks)


class CutHeads:
    """Rows of heads are cut between ranks by work, and tables of boxes say what goes where. See WholeHeads."""

    def __init__(self, host: Route, masks: Sequence[Mask], device: torch.device) -> None:
        self.host, self.tasks, self.masks, self.device = host, host.tasks, masks, device
        self.sent, self.received = host.inputs.sizes, host.arrivals.sizes
        self.returned, self.results = host.outputs.sizes, host.results.sizes

    @cached_property
    def inputs(self) -> Tensor:
        """The boxes of the first send buffer."""
        return self._table(self.host.inputs)

    @cached_property
    def arrivals(self) -> Tensor:
        """The boxes of the first receive buffer."""
        return self._table(self.host.arrivals)

    @cached_property
    def outputs(self) -> Tensor:
        """The boxes of the second send buffer."""
        return self._table(self.host.outputs)

    @cached_property
    def outcomes(self) -> Tensor:
        """The boxes of the second receive buffer."""
        return self._table(self.host.results)

    def _table(self, buffer: Buffer) -> Tensor:
        return pack.box_table(buffer.boxes, self.device)

    def pack(self, states: States, rotation: Rotation | None = None) -> Tensor:
        """This rank's q, k and v, q and k as `rotation` says, as the send buffer."""
        turned = states if rotation is None else pack.rotated(states, rotation)
        return pack.pack_boxes(turned, self.inputs, sum(self.sent))

    def unpack_gradients(self, flat: Tensor, grads: States, rotation: Rotation | None = None) -> Tensor | None:
        """The adjoint of `pack`, written to `grads`; what `pack.unpack_heads` returns."""
        if rotation is None:
            pack.unpack_boxes(flat, self.inputs, grads)
            return None
        counts, (rows, _, dim) = [x.shape[1] for x in grads], grads[0].shape
        turned = flat.new_empty(rows, sum(counts), dim)
        pack.unpack_boxes(flat, self.inputs, turned.split(counts, 1))
        return pack.unpack_heads(turned.flatten(0, 1), grads, 1, rotation.adjoint)

    def states(self, received: Tensor) -> list[States]:
        """q, k and v of each task, from the receive buffer."""
        if self.host.in_place:
            return [self._viewed(received)]
        places = self._apart(received)
        if places:
            pack.unpack_boxes(received, self.arrivals, [x for states in places for x in states])
        return places

    def places(self, received: Tensor) -> tuple[Tensor, list[States]]:
        """Where the gradients of `states` are to be written, and before that the buffer behind these places, which is
        empty where they are apart."""
        if not self.host.in_place and self.tasks:
            return received[:0], self._apart(received)
        buffer = received.new_empty(received.shape)
        return buffer, [self._viewed(buffer)] if self.tasks else []

    def join_gradients(self, buffer: Tensor, places: list[States]) -> Tensor:
        """The adjoint of `states`."""
        if self.host.in_place or not places:  # a rank without work returns nothing, but takes part in the exchange
            return buffer
        return pack.pack_boxes([x for states in places for x in states], self.arrivals, sum(self.received))

    def join(self, outs: list[Tensor], like: Tensor) -> Tensor:
        """The outputs of the tasks as the send buffer of the second exchange."""
        if len(outs) == 1:  # its rows stand in the order of the ranks that have them
            return outs[0].flatten(0, 1)
        return pack.pack_boxes(outs, self.outputs, sum(self.returned)) if outs else like[:0]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The adjoint of `join`."""
        outs = [flat.new_empty(len(task.rows), len(task.q), flat.shape[-1]) for task in self.tasks]
        if len(outs) == 1:
            return [flat.view(outs[0].shape)]
        if outs:
            pack.unpack_boxes(flat, self.outputs, outs)
        return outs

    def _viewed(self, buffer: Tensor) -> States:
        """The one task's, whose rows are its keys: the buffer is its stream, token by token."""
        (task,) = self.tasks
        q, k, v = buffer.view(len(task.rows), -1, buffer.shape[-1]).split([len(task.q), len(task.kv), len(task.kv)], 1)
        return q, k, v

    def _apart(self, like: Tensor) -> list[States]:
        """New tensors for each task."""
        shapes = [(len(task.rows), len(task.q), len(task.keys), len(task.kv), like.shape[-1]) for task in self.tasks]
        return [
            (like.new_empty(rows, q, dim), like.new_empty(keys, kv, dim), like.new_empty(keys, kv, dim))
            for rows, q, keys, kv, dim in shapes
        ]

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        """This rank's outputs, written to `out`."""
        pack.unpack_boxes(flat, self.outcomes, [out])

    def pack_gradients(self, dout: Tensor) -> Tensor:
        """The adjoint of `unpack`."""
        return pack.pack_boxes([dout], self.outcomes, sum(self.results))


HeadRoute = WholeHeads | CutHeads
