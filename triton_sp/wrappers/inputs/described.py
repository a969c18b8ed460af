"""What the ranks compare of a call before it runs: its arguments, and what each rank has prepared of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from triton_sp._version import __version__
from triton_sp.anatomy.parts import device_of
from triton_sp.errors import InputError
from triton_sp.ops.dispatch import implementation
from triton_sp.plan.cost import find_link
from triton_sp.ranks import collectives
from triton_sp.ranks.agreement import agree, hashed
from triton_sp.ranks.backwards import Nodes
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.inputs.state import autocast_of
from triton_sp.wrappers.install import Installation, Override

# Tensors up to so many elements are compared by value, others by shape. With check="first" grids of images still are:
# towers make their plans of them.
_CHECKED_VALUES, _ALWAYS_CHECKED = 1 << 28, 1 << 10
_T = TypeVar("_T")


def bind_on_all(override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. A rank whose call does not fit the model's signature must not leave the others waiting."""
    try:
        return override.bind(args, kwargs)
    except TypeError as error:
        failure = error  # Python forgets `error` here

    def refuse() -> None:
        name = type(override.module).__name__
        raise InputError(
            f"arguments of {name}", expected=f"{override.__signature__}", found=str(failure), remedy="correct the call"
        ) from failure

    prepare_on_all(override.installation, {}, refuse)
    raise failure


def describe_messages(installation: Installation | None) -> str:
    """How ranks tell one another what they were given, for `explain`."""
    if installation is None or installation.idle:
        return ""
    if collectives.control_device(installation.group).type == "cpu":
        return "the CPU"
    return (
        "the device, for which the host waits in each forward and backward; a group with a CPU backend too, "
        'init_process_group("cpu:gloo,cuda:nccl"), does not, and notices ranks that fail'
    )


def prepare_on_all(
    installation: Installation, arguments: dict[str, Any], prepare: Callable[[], _T], plan: Callable[[_T], str] = repr
) -> _T:
    """What `prepare` makes of a call's arguments, once all ranks agree on these, as `SPConfig.check` says.

    Args:
        prepare: validates the arguments; what it raises is raised on every rank.
        plan: what must be equal on all ranks of what was prepared, in a line.
    """
    check, state = installation.config.check, installation.state
    if check == "off" and state.calls:
        return prepare()
    looked = state.look()

    def describe(most: int, prepared: _T) -> str:
        return f"{_describe(installation, arguments, most)}\nstate={looked}\nplan={plan(prepared)}"

    return agree(
        installation.group,
        prepare,
        partial(describe, _CHECKED_VALUES),
        partial(describe, _ALWAYS_CHECKED) if check == "first" else None,
        installation.agreed,
        step=f"forward {state.calls} of {type(state.model).__name__}",
        details=state.details,
    )


def agree_on_backward(installation: Installation, step: str, exchanges: Nodes | None) -> None:
    """At the start of a backward: all ranks begin that of the same forward, and will make the same exchanges in it.

    A rank whose weights are frozen, or that asks for the gradients of others, makes fewer exchanges.

    Args:
        exchanges: the nodes of the graph that make one, as far as they live; None where those inside of compiled graphs
            are not known.
    """

    def describe(_: None) -> str:
        if exchanges is None:
            return "exchanges=not counted under torch.compile"
        nodes = [node() for node in exchanges]
        will = [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
        executed = "".join(str(int(one)) for one in will)
        return f"exchanges={executed.count('1')} of {len(executed)}, {hashed(executed)}"

    agree(installation.group, lambda: None, describe, step=step)


def agree_on_gradients(installation: Installation, parameters: list[nn.Parameter], everyone: Group) -> None:
    """Before gradients are added up: all ranks are about to add those of the same parameters."""

    def check() -> None:
        if any(p.grad is not None and p.grad.layout != torch.strided for p in parameters):
            raise InputError(
                "gradients", expected="dense ones", found="a sparse one", remedy="use embeddings with sparse=False"
            )

    def describe(_: None) -> str:
        unlike = {p.grad.dtype for p in parameters if p.grad is not None and p.grad.dtype != p.dtype}
        kinds = f"gradients={len(parameters)}, of other dtypes than their weights: {sorted(map(str, unlike))}"
        return f"{kinds}\nstate={installation.state.structure()}"

    agree(everyone, check, describe, step="sync_gradients", details=installation.state.lines)


def _describe(installation: Installation, arguments: dict[str, Any], most: int) -> str:
    """What must be equal on all ranks, a line a field; tensors of up to `most` elements by content."""
    model = installation.anatomy.entry
    lines = [f"triton_sp={__version__}", f"model={type(model).__name__}", f"config={installation.config}"]
    device = device_of(model).type
    lines += [f"training={model.training}", f"grad={torch.is_grad_enabled()}", f"autocast={autocast_of(device)}"]
    if installation.config.attention in ("triton", "auto"):
        implementation(device_of(model))  # raises where our kernels are wrong: here, it does so on every rank
    # Calibrated on each host: where they differ, plans would.
    lines.append(f"link={find_link(installation.config.link, device, installation.group.size)}")
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            lines.append(
                f"{name}={tuple(value.shape)} {str(value.dtype)[6:]} {value.device.type}{_digest(value, most)}"
            )
        elif value is not None and not isinstance(value, Mapping | list | tuple):
            lines.append(f"{name}={value!s:.40}")
    return "\n".join(lines)


def _digest(value: Tensor, most: int) -> str:
    """Ids, labels, masks and grids by content, because they decide every rank's plan; pixels by the sums of their rows'
    bits, where content is compared at all."""
    small = value.numel() <= _ALWAYS_CHECKED or (value.shape[-1] <= 3 and not value.is_floating_point())
    if value.is_meta or value.is_complex() or not value.numel() or (not small and value.numel() > most):
        return ""
    value = value.detach()
    if value.is_floating_point():
        if most == _ALWAYS_CHECKED:
            return ""
        value = row_sums(value)
    content: Any = value.cpu().contiguous().view(-1).numpy()
    # Processors have instructions for SHA-256: 1M ids take 6 ms, with BLAKE2 18 (measured).
    return " " + hashlib.sha256(content, usedforsecurity=False).hexdigest()[:12]


def row_sums(value: Tensor) -> Tensor:
    """The sum of the bits of each row, in the largest words that fill it. On a CPU 64 images of 336 x 336 take 6 ms in
    words of 8 bytes, and 138 in words of 4, which are widened before they are added (measured)."""
    rows = value.flatten(1) if value.ndim > 1 else value.reshape(1, -1)
    words = max(size for size in _WORDS if rows.shape[1] * rows.element_size() % size == 0)
    rows = rows.contiguous()
    if rows.storage_offset() * rows.element_size() % words:
        rows = rows.clone()
    return rows.view(_WORDS[words]).sum(1)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
