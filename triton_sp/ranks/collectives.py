"""What travels between ranks: the exchange, the gather, gradients and short messages.

Only this module and groups.py call torch.distributed. The backward of every movement is its exact adjoint. The exchange
and the gather are both made of one all-to-all with uneven parts, because this is the collective that gloo and NCCL both
run with parts of any size, also 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from triton_sp.ops.differentiable import once_differentiable
from triton_sp.ranks.backwards import note_backward
from triton_sp.ranks.boards import blaming, board_of
from triton_sp.ranks.groups import Group, resolve_group, world_rank

_BUCKET_BYTES = 64 << 20  # of gradients in one collective
_NOTICE_BYTES = 1024  # what a rank sends the others before a forward: a kind, a digest, or the text of an error


# --- what was sent -----------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """The collectives of a `with record()` block, as (name, bytes that this rank has sent to other ranks)."""

    entries: list[tuple[str, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The bytes that this rank has sent to other ranks, in all collectives."""
        return sum(size for _, size in self.entries)

    def count(self, name: str) -> int:
        """How many collectives of a name there were."""
        return sum(entry == name for entry, _ in self.entries)


_ledgers: list[Ledger] = []


@contextmanager
def record() -> Iterator[Ledger]:
    """Record the collectives of a block, also those of a backward that runs inside of it."""
    ledger = Ledger()
    _ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _ledgers[:] = [other for other in _ledgers if other is not ledger]


def _note(name: str, sent: int) -> None:
    for ledger in _ledgers:
        ledger.entries.append((name, sent))


# --- waiting -----------------------------------------------------------------------------------------------------


def _wait(x: Tensor, group: Group) -> Tensor:
    with blaming(group):
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return funcol.wait_tensor(x)  # the device waits, not the program
        return board_of(group).wait(lambda: funcol.wait_tensor(x))


# --- movements ---------------------------------------------------------------------------------------------------


def _all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, name: str) -> Tensor:
    """Send `send[p]` rows of x to rank p and receive `receive[p]` from it. Every rank knows these sizes already."""
    return _wait(_issue(x, send, receive, group, name), group)


def _issue(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, name: str) -> Tensor:
    """Like `_all_to_all`, but without waiting: the result must not be used before `_wait`."""
    row_bytes = x.element_size() * (x[:1].numel() if len(x) else 0)
    _note(name, (sum(send) - send[group.rank]) * row_bytes)
    with blaming(group):
        return all_to_all_single(x.contiguous(), list(receive), list(send), group.process_group.group_name)


def all_to_all_single(
    tensor: Tensor, output_split_sizes: list[int], input_split_sizes: list[int], group_name: str
) -> Tensor:
    """funcol's without what torch does around it, which takes half of the host's time (0.2 ms of 0.44 where ranks share
    2 cores, measured): a tensor subclass that waits as soon as anything touches it, and autograd does."""
    return torch.ops._c10d_functional.all_to_all_single(tensor, output_split_sizes, input_split_sizes, group_name)


class Pending(NamedTuple):
    """An all-to-all that has begun; it has no gradient."""

    arriving: Tensor
    group: Group


def begin_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Pending:
    """Start an all-to-all and return at once; arguments as for `exchange`. There is no gradient."""
    return Pending(_issue(x, send, receive, group, "exchange"), group)


def finish(pending: Pending) -> Tensor:
    """What an all-to-all has brought, in rank order. On a GPU the device waits for it, not the program."""
    return _wait(*pending)


class _Exchange(torch.autograd.Function):
    """An all-to-all. Its adjoint sends everything back."""

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
    """Send `send[p]` rows of x to each rank p, and return what arrives from all ranks.

    Args:
        x: (rows, ...), of any dtype; the rows for rank 0 come first, then those for rank 1, and so on.
        send, receive: how many rows this rank sends to each rank and gets from it.

    Returns:
        (sum(receive), ...), the rows from rank 0 first. Its gradient is exchanged back.

    Raises:
        PeerError: another rank has failed.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> exchange(torch.tensor([1.0, 2.0]), [2], [2], resolve_group()).tolist()
    [1.0, 2.0]
    >>> dist.destroy_process_group()
    """
    return note_backward(_Exchange.apply(x, tuple(send), tuple(receive), group))


class _Gather(torch.autograd.Function):
    """An all-gather of uneven rows. Its adjoint sends each rank the gradients of its rows, which the rank adds up."""

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
    """The rows of all ranks, (sum(sizes), ...) in rank order, where rank p has `sizes[p]`; differentiable."""
    if group.size == 1:
        return x
    return note_backward(_Gather.apply(x, sizes, group))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; in the backward its gradient is multiplied by `factor`."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]


class _TotalOfShares(torch.autograd.Function):
    """The sum over ranks. Every rank has the same total, and the same upstream gradient, which each share gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def total_of_shares(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks of their shares, for instance of the loss. The gradient of a share is that of the total."""
    return _TotalOfShares.apply(x, group)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of x over ranks, as a new tensor without a gradient."""
    if group.size == 1:
        return x.detach().clone()
    _note("all_reduce", x.numel() * x.element_size())
    with blaming(group):
        total = funcol.all_reduce(x.detach(), "sum", group.process_group)
    return _wait(total, group)


def largest(value: float, group: Group, device: torch.device) -> float:
    """The largest of the ranks' values."""
    everyone = funcol.all_reduce(torch.tensor(value, device=device), "max", group.process_group)
    return float(funcol.wait_tensor(everyone))


def all_reduce_gradients(parameters: Sequence[torch.nn.Parameter], group: Group, scale: float) -> None:
    """Replace each `.grad` by `scale` times its sum over ranks. A rank without a gradient takes part with zeros.

    A parameter without a gradient on every rank keeps none, as in one process: an optimizer with weight decay would
    change a weight whose gradient is zero. Gradients travel in buckets, because a model has hundreds of small ones and
    each collective costs its latency.
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
    """Lists of parameters of one dtype and device, in order and up to a size; the same lists on every rank."""
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
    """The device on which small messages of the host travel: the CPU if the group has a CPU backend, else this GPU."""
    types = {torch.device(kind).type for kind in group.process_group._device_types}
    return (
        torch.device("cpu") if "cpu" in types else torch.device(types.pop(), torch.accelerator.current_device_index())
    )


def notices_of_all(notice: bytes, group: Group) -> list[bytes]:
    """A short message from every rank, in rank order; each is cut to 1024 bytes."""
    padded = notice[:_NOTICE_BYTES].ljust(_NOTICE_BYTES, b"\0")
    everyone = _of_all(torch.frombuffer(bytearray(padded), dtype=torch.uint8), group)
    return [row.tobytes().rstrip(b"\0") for row in everyone.cpu().numpy()]


def integers_of_all(values: Sequence[int], group: Group) -> list[list[int]]:
    """The integers of every rank, in rank order; all ranks pass equally many."""
    return _of_all(torch.tensor(values, dtype=torch.int64), group).tolist()


def leaders(group: Group) -> list[int]:
    """The world ranks that come first in their groups, in order. All ranks of all groups must call this."""
    everyone = integers_of_all([world_rank(0, group)], resolve_group())
    return sorted({leader for (leader,) in everyone})


def _of_all(own: Tensor, group: Group) -> Tensor:
    """The n numbers of every rank, (P, n) on the CPU."""
    if group.size == 1:
        return own[None]
    everyone = own.to(control_device(group)).repeat(group.size)
    _note("agree", (group.size - 1) * own.nbytes)
    with blaming(group):
        arriving = send_alike(everyone, [len(own)] * group.size, group.process_group.group_name)
    return _wait(arriving, group).view(group.size, -1).cpu()


def send_alike(x: Tensor, sizes: list[int], group_name: str) -> Tensor:
    """An all-to-all in which ranks compare what they have, twice in a step; by a name of its own, because perf counts
    those that move tokens."""
    return torch.ops._c10d_functional.all_to_all_single(x, sizes, sizes, group_name)


def deal(x: Tensor, sizes: Sequence[int], source: int, group: Group) -> Tensor:
    """Of the rows of rank `source`, `sizes[p]` for each rank p, in rank order: this rank's. The others pass none.

    The result is on the CPU if the group has a CPU backend, else on the GPU.
    """
    given = group.rank == source
    send = list(sizes) if given else [0] * group.size
    receive = [sizes[group.rank] if rank == source else 0 for rank in range(group.size)]
    return _all_to_all(x.to(control_device(group)), send, receive, group, "deal")


def broadcast(x: Tensor, source: int, group: Group) -> Tensor:
    """The tensor of rank `source` of the group, on every rank. The others pass one of the same size and dtype.

    The result is on the CPU if the group has a CPU backend, else on the GPU.
    """
    _note("broadcast", x.nbytes * (group.size - 1) if group.rank == source else 0)
    with blaming(group):
        sent = funcol.broadcast(x.to(control_device(group)), source, group.process_group)
    return _wait(getattr(sent, "elem", sent), group)
