"""Process groups: the ranks that share each batch, and all ranks. What travels between them is in collectives.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store, _resolve_process_group

from triton_sp.errors import GroupError


@dataclass(frozen=True)
class Group:
    """A process group by its name. Unlike the group itself it can be copied and pickled together with a model.

    Attributes:
        name: of the process group, in this process.
        rank: this rank's number inside of the group.
        size: how many ranks the group has.
    """

    name: str
    rank: int
    size: int

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group itself.

        Raises:
            GroupError: this process has no group of that name.
        """
        try:
            found = _resolve_process_group(self.name)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise GroupError(
                "group",
                expected=f"the process group {self.name!r} that the model was wrapped with",
                found="no such group in this process",
                remedy="call triton_sp.unwrap(model) and wrap it with a group of this process",
            ) from error
        if _inherited and any(found is other for other in _inherited):
            raise GroupError(
                "group",
                expected="a process that has made its process group itself",
                found=f"a forked child, process {os.getpid()}: its parent is the rank",
                remedy="call the model in the parent only, or unwrap the child's copy of it",
            )
        return found

    @property
    def store(self) -> dist.Store:
        """The key/value store of the group, which all of its ranks can reach."""
        return _get_process_group_store(self.process_group)


_inherited: list[Any] = []  # the groups of the parent of this process, in a forked child


def _remember_inherited() -> None:
    if dist.is_available() and dist.is_initialized():
        _inherited.extend(dist.distributed_c10d._world.pg_map)


os.register_at_fork(after_in_child=_remember_inherited)


def exists(name: str) -> bool:
    """Whether there is a process group of that name."""
    try:
        return _resolve_process_group(name) is not None  # type: ignore[arg-type]
    except RuntimeError:
        return False


ALONE = Group("", 0, 1)  # a rank by itself, for what every rank computes completely; nothing is sent in it


def backends() -> list[str]:
    """The libraries that can connect ranks here, of those that are used: gloo for CPUs, nccl for GPUs."""
    if not dist.is_available():
        return []
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, found in there.items() if found]


def resolve_group(group: Any = None) -> Group:
    """The ranks that share a batch, from any of the objects that people have for them.

    Args:
        group: a ProcessGroup; a DeviceMesh with one axis or an axis named "sp"; an object with DeepSpeed's
            `get_sequence_parallel_group()`; None for all ranks.

    Raises:
        GroupError: torch.distributed is not initialised, the type is none of these, or this rank is not a member.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            "group",
            expected="an initialised torch.distributed",
            found="none in this process",
            remedy="start with torchrun and call torch.distributed.init_process_group() before wrap",
        )
    process_group = _process_group(group)
    if process_group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(process_group) < 0:
        raise GroupError(
            "group",
            expected="a group that this rank is a member of",
            found="a group of other ranks",
            remedy="pass each rank the group that it belongs to",
            rank=dist.get_rank(),
        )
    return Group(process_group.group_name, dist.get_rank(process_group), dist.get_world_size(process_group))


def _process_group(group: Any) -> Any:
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER:
        return group
    if isinstance(group, dist.DeviceMesh):
        if group.ndim == 1:
            return group.get_group()
        if "sp" in (group.mesh_dim_names or ()):
            return group["sp"].get_group()
        raise GroupError(
            "group",
            expected='a DeviceMesh with one axis, or with an axis named "sp"',
            found=f"axes {group.mesh_dim_names}",
            remedy='pass mesh["name of the sequence axis"]',
        )
    if hasattr(group, "get_sequence_parallel_group"):
        return group.get_sequence_parallel_group()
    raise GroupError(
        "group",
        expected="a ProcessGroup, a DeviceMesh, an object with get_sequence_parallel_group(), or None",
        found=type(group).__name__,
        remedy="pass torch.distributed.new_group(ranks), or None for all ranks",
    )


def resolve_everyone(group: Any = None) -> Group:
    """All ranks that train a model, of all groups: like `resolve_group`, but a DeviceMesh must have one axis.

    Raises:
        GroupError: as for `resolve_group`, or a mesh with several axes.
    """
    if isinstance(group, dist.DeviceMesh) and group.ndim > 1:
        raise GroupError(
            "group",
            expected="all ranks that train the model, as one group",
            found=f"a DeviceMesh of the axes {group.mesh_dim_names}",
            remedy="leave it out, for all ranks, or pass the mesh flattened",
        )
    return resolve_group(group)


def new_group(divisions: list[list[int]]) -> Group:
    """Create a process group for each list of world ranks; return the one of this rank. All ranks must call this."""
    return resolve_group(dist.new_subgroups_by_enumeration(divisions)[0])


def world_rank(rank: int, group: Group) -> int:
    """The number among all ranks of a rank of a group."""
    return dist.get_global_rank(group.process_group, rank)


def adds_in_part(group: Any) -> bool:
    """True for DeepSpeed's own mpu: with it ZeRO 0 to 2 add gradients over the group, and ZeRO 3 averages them."""
    return hasattr(group, "get_sequence_parallel_world_size")


def start_ranks(ranks: int, module: str, *arguments: str) -> None:
    """Run a module in a number of processes on this machine, as torchrun does."""
    from torch.distributed.run import main as torchrun

    torchrun(["--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments])


def neighbours(size: int | None) -> dist.ProcessGroup | None:
    """The group of `size` neighbouring ranks that this one is in; None, for all ranks, if no size is given.

    Raises:
        GroupError: the number of all ranks is no multiple of it.
    """
    if size is None or not dist.is_initialized():
        return None
    everyone = dist.get_world_size()
    if size < 1 or everyone % size:
        raise GroupError(
            "group",
            expected=f"a size that divides the {everyone} ranks",
            found=f"{size}",
            remedy="start a multiple of it, or choose another size",
        )
    own: Any = dist.new_subgroups(size)[0]  # on a rank of no group it would be a number, but every rank is in one
    return own


def join_world(device: torch.device) -> Group:
    """Initialise torch.distributed from torchrun's environment, and return the group of all ranks."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    return resolve_group()


def leave_world() -> None:
    """Undo `join_world`."""
    dist.destroy_process_group()


@contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    """For a time: this process as one rank of a default group whose other ranks do not exist. Sends arrive nowhere, and
    what is received is any numbers. For plans (forecast/), and to measure one rank of many.

    Raises:
        GroupError: torch.distributed is in use.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise GroupError(
            "group", expected="a process without ranks", found="an initialised torch.distributed", remedy="plan before"
        )
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
