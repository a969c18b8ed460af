"""What travels between ranks: the exchange, the gather, gradients, short messages. With groups.py the only module that
talks to torch.distributed.

Whatever crosses ranks has a backward that is its exact adjoint. Both movements are one primitive, the all-to-all with
uneven parts, because that is the one collective which gloo and NCCL both run with parts of any size, 0 included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.distributed.distributed_c10d import _get_process_group_store

from triton_sp.ops.differentiable import once_differentiable
from triton_sp.ranks.failures import FailureBoard
from triton_sp.ranks.groups import Group, resolve_group, world_rank

_BUCKET_BYTES = 64 << 20  # of gradients in one collective
_NOTICE_BYTES = 1024  # what a rank tells the others before a forward: a kind, a digest or the text of an error


# --- what was sent -----------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Every collective of a `with comm.record()` block, as (name, bytes this rank sent to other ranks)."""

    entries: list[tuple[str, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.entries)

    def count(self, name: str) -> int:
        return sum(entry == name for entry, _ in self.entries)


_ledgers: list[Ledger] = []


@contextmanager
def record() -> Iterator[Ledger]:
    """Count the collectives and bytes of a block, the backward's too if it runs inside."""
    ledger = Ledger()
    _ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _ledgers[:] = [other for other in _ledgers if other is not ledger]


def _note(name: str, sent: int) -> None:
    for ledger in _ledgers:
        ledger.entries.append((name, sent))


# --- failures of other ranks ---------------------------------------------------------------------------------------

_notes: dict[str, FailureBoard] = {}  # by the name of the group; a later one of that name has another store


def board_of(group: Group) -> FailureBoard:
    """By which the ranks of a group hear of one another's failures."""
    store = _get_process_group_store(group.process_group)
    notes = _notes.get(group.name)
    if notes is None or notes.store is not store:
        notes = _notes[group.name] = FailureBoard(store, group.rank, group.size)
    return notes


@contextmanager
def _blaming(group: Group) -> Iterator[None]:
    """Turn the error of a collective into one that names the rank to blame."""
    try:
        yield
    except RuntimeError as error:
        raise board_of(group).explain(error) from error


def _wait(x: Tensor, group: Group) -> Tensor:
    with _blaming(group):
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return funcol.wait_tensor(x)  # lets the program go on, and the device wait
        return board_of(group).wait(lambda: funcol.wait_tensor(x))


# --- movements ---------------------------------------------------------------------------------------------------


def _all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, name: str) -> Tensor:
    """Rows `send[p]` of x go to rank p; `receive[p]` rows come from it. All sizes are known: nothing is asked."""
    return _wait(_issue(x, send, receive, group, name), group)


def _issue(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, name: str) -> Tensor:
    """The same, without waiting: the result may be touched only after `_wait`."""
    row_bytes = x.element_size() * (x[:1].numel() if len(x) else 0)
    _note(name, (sum(send) - send[group.rank]) * row_bytes)
    with _blaming(group):
        out = funcol.all_to_all_single(x.contiguous(), list(receive), list(send), group.process_group)
    return getattr(out, "elem", out)  # without the subclass that waits at the first touch: autograd touches it


class Pending(NamedTuple):
    """An all-to-all on its way, without a gradient."""

    arriving: Tensor
    group: Group


def begin_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Pending:
    """Send `send[p]` rows of x (dim 0, in rank order) to each rank p, and return at once."""
    return Pending(_issue(x, send, receive, group, "exchange"), group)


def finish(pending: Pending) -> Tensor:
    """What came, in rank order. On a GPU it is the device that waits."""
    return _wait(*pending)


class _Exchange(torch.autograd.Function):
    """An all-to-all; its adjoint sends everything back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (receive, send), group
        return finish(begin_all_to_all(x, send, receive, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive = ctx.sizes
        return finish(begin_all_to_all(grad, send, receive, ctx.group)), None, None, None


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send `send[p]` rows of x (dim 0, in rank order) to each rank p; return what came, in rank order."""
    return _Exchange.apply(x, tuple(send), tuple(receive), group)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """All-gather of uneven rows; its adjoint sends each rank the gradients of its rows, which it adds up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        everywhere = x.expand(group.size, *x.shape).flatten(0, 1)
        return _all_to_all(everywhere, [len(x)] * group.size, sizes, group, "gather")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        own = ctx.sizes[group.rank]
        shares = _all_to_all(grad, ctx.sizes, [own] * group.size, group, "gather")
        return shares.unflatten(0, (group.size, own)).sum(0), None, None


def gather(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, in rank order, of which rank p has `sizes[p]` (dim 0)."""
    if group.size == 1:
        return x
    return _Gather.apply(x, sizes, group)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor`."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]


class _TotalOfShares(torch.autograd.Function):
    """The sum over ranks. Every rank holds the same total and the same upstream gradient, which each share gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def total_of_shares(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of each one's share, e.g. of the loss; the gradient of a share is the upstream's."""
    return _TotalOfShares.apply(x, group)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, without a gradient."""
    _note("all_reduce", x.numel() * x.element_size())
    with _blaming(group):
        total = funcol.all_reduce(x.detach(), "sum", group.process_group)
    return _wait(total, group)


def largest(value: float, group: Group, device: torch.device) -> float:
    """The largest of the ranks' values."""
    everyone = funcol.all_reduce(torch.tensor(value, device=device), "max", group.process_group)
    return float(funcol.wait_tensor(everyone))


def all_reduce_gradients(parameters: Sequence[torch.nn.Parameter], group: Group, scale: float) -> None:
    """Replace each .grad by `scale` times its sum over ranks; a rank without one takes part with zeros.

    What has none on any rank keeps none, as in one process: an optimizer would decay a weight whose gradient is zero.
    Gradients travel in buckets: a model has hundreds of small ones, and each collective costs its latency.
    """
    if not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    used = all_reduce(present, group).tolist()
    for bucket in _buckets([p for p, count in zip(parameters, used, strict=True) if count]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        total = all_reduce(torch.cat([grad.flatten() for grad in grads]), group).mul_(scale)
        for parameter, part in zip(bucket, total.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter).clone()  # not a view: it would keep the whole bucket


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one dtype and device, in order, up to a size; the same on every rank."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        bucket = kinds.setdefault((parameter.dtype, parameter.device), [])
        if bucket and sum(p.nbytes for p in bucket) + parameter.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket = kinds[parameter.dtype, parameter.device] = []
        bucket.append(parameter)
    yield from kinds.values()


# --- short messages ------------------------------------------------------------------------------------------------


def control_device(group: Group) -> torch.device:
    """Where small host-side messages travel: the CPU if the group has a CPU backend, else this rank's GPU."""
    types = {torch.device(kind).type for kind in group.process_group._device_types}
    return (
        torch.device("cpu") if "cpu" in types else torch.device(types.pop(), torch.accelerator.current_device_index())
    )


def notices_of_all(notice: bytes, group: Group) -> list[bytes]:
    """A short message of every rank, in rank order, cut to what a notice holds."""
    padded = notice[:_NOTICE_BYTES].ljust(_NOTICE_BYTES, b"\0")
    everyone = _of_all(torch.frombuffer(bytearray(padded), dtype=torch.uint8), group)
    return [bytes(row.tolist()).rstrip(b"\0") for row in everyone]


def integers_of_all(values: Sequence[int], group: Group) -> list[list[int]]:
    """The integers of every rank, in rank order; each rank gives as many."""
    return _of_all(torch.tensor(values, dtype=torch.int64), group).tolist()


def leaders(group: Group) -> list[int]:
    """The world ranks that are the first of their groups, in order. To be called on all ranks of all groups."""
    everyone = integers_of_all([world_rank(0, group)], resolve_group())
    return sorted({leader for (leader,) in everyone})


def _of_all(own: Tensor, group: Group) -> Tensor:
    """(P, n) on the CPU: the n numbers of every rank."""
    sizes = [len(own)] * group.size
    everyone = own.to(control_device(group)).repeat(group.size)
    return _all_to_all(everyone, sizes, sizes, group, "agree").view(group.size, -1).cpu()


def broadcast(x: Tensor, source: int, group: Group) -> Tensor:
    """What `x` is on rank `source` of the group, on every rank; the others give one of the same size and dtype.

    On the CPU if the group has a CPU backend, else on the GPU.
    """
    _note("broadcast", x.nbytes * (group.size - 1) if group.rank == source else 0)
    with _blaming(group):
        sent = funcol.broadcast(x.to(control_device(group)), source, group.process_group)
    return _wait(getattr(sent, "elem", sent), group)
