"""Training as users do it, with checkpoints, in which a fault strikes one rank: what `make chaos` runs on each rank."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from kit import mishaps, tiny, zoo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import triton_sp
from triton_sp import SPConfig

STEPS, SAVE_EVERY = 6, 2
HEARTBEAT, PAUSE = 5.0, 1.5  # seconds: a rank that pauses is not taken for one that has stopped
CASE = zoo.CASES["llava"]


class Fault(NamedTuple):
    """What happens to which rank, in which step and where: "tower", "forward", "backward", "update", "checkpoint", or
    "any" after `delay` seconds of the step."""

    kind: str
    rank: int
    step: int
    where: str
    delay: float = 0.0


ACTIONS: dict[str, Callable[[], None]] = {
    "killed": mishaps.kill,
    "stopped": mishaps.stop,
    "paused": partial(mishaps.stop, PAUSE),
    "exception": partial(mishaps.fail, RuntimeError("a fault")),
    "slow": partial(time.sleep, PAUSE),
    "out of memory": mishaps.exhaust_memory,
    "connections cut": mishaps.cut_connections,
    "disk full": lambda: None,  # see `Checkpoints`
}


@dataclass
class Strike:
    """Lets a fault happen on this rank, once."""

    fault: Fault | None
    folder: Path
    step: int = -1

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        if self._is_now("any"):
            timer = threading.Timer(self.fault.delay, self._happen)
            timer.daemon = True
            timer.start()

    def at(self, where: str) -> None:
        """The step has come to a place."""
        if self._is_now(where):
            self._happen()

    def _is_now(self, where: str) -> bool:
        fault = self.fault
        return fault is not None and (fault.rank, fault.step, fault.where) == (dist.get_rank(), self.step, where)

    def _happen(self) -> None:
        (self.folder / "struck").touch()
        kind, self.fault = self.fault.kind, None
        ACTIONS[kind]()


# --- checkpoints ---------------------------------------------------------------------------------------------------


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _as(parameter: Tensor, local: Tensor) -> Tensor:
    """A tensor that is sharded as the parameter is, from this rank's part."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


@dataclass
class Checkpoints:
    """A file of each rank for each checkpoint. One that lacks a file was not finished, and is not read."""

    folder: Path
    strike: Strike

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Write this rank's part, whole or not at all."""
        file = self.folder / f"{steps}" / f"{dist.get_rank()}.pt"
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        if self.strike._is_now("checkpoint"):
            (self.folder / "struck").touch()
            part.symlink_to("/dev/full")  # every write to it fails as on a disk that is full
        weights = [_local(tensor).detach() for tensor in model.state_dict().values()]
        moments = [[_local(value) for value in optimizer.state[p].values()] for p in _parameters(optimizer)]
        try:
            with part.open("wb") as out:
                torch.save({"weights": weights, "moments": moments}, out)
        except BaseException:
            part.unlink()
            raise
        part.rename(file)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Read the last that is whole; how many steps had been made."""
        everyone = range(dist.get_world_size())
        steps = [
            int(place.name)
            for place in self.folder.iterdir()
            if place.name.isdigit() and all((place / f"{rank}.pt").exists() for rank in everyone)
        ]
        if not steps:
            return 0
        saved = torch.load(self.folder / f"{max(steps)}" / f"{dist.get_rank()}.pt", weights_only=True)
        with torch.no_grad():
            for tensor, value in zip(model.state_dict().values(), saved["weights"], strict=True):
                _local(tensor).copy_(value)
        for parameter, values in zip(_parameters(optimizer), saved["moments"], strict=True):
            if values:
                steps_made, *moments = values
                named = zip(("exp_avg", "exp_avg_sq"), (_as(parameter, moment) for moment in moments), strict=True)
                optimizer.state[parameter] = {"step": steps_made, **dict(named)}
        return max(steps)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --- training ------------------------------------------------------------------------------------------------------


def engine_of(name: str, model: nn.Module, mesh: DeviceMesh) -> tuple[nn.Module, Callable[[], None]]:
    """The module to call, and what follows a backward."""
    if name == "fsdp":
        flat = mesh._flatten()
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=flat)
        fully_shard(model, mesh=flat)
    triton_sp.wrap(model, mesh, config=SPConfig(heartbeat=HEARTBEAT))
    if name == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True), lambda: None
    return model, (lambda: triton_sp.sync_gradients(model)) if name == "loop" else (lambda: None)


def batch(step: int, replica: int) -> dict[str, Tensor]:
    """Other words in each step, for each replica."""
    found = CASE.batch("plain", torch.float32)
    generator = torch.Generator().manual_seed(100 * step + replica)
    words = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, found["input_ids"].shape, generator=generator)
    found["input_ids"] = torch.where(found["input_ids"] == tiny.IMAGE, tiny.IMAGE, words)
    found["labels"] = torch.where(found["input_ids"] == tiny.IMAGE, -100, words)
    return found


def train(folder: Path, engine: str, replicas: int, fault: Fault | None = None) -> str:
    """Train from the last checkpoint in a folder to the last step; a digest of this rank's weights and moments."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "sp"))
    model = CASE.model(torch.float32)
    strike = Strike(fault, folder)
    for where, module in (("tower", model.model.vision_tower), ("forward", model.model.language_model)):
        mishaps.strike(module, "forward", partial(strike.at, where))
    mishaps.strike(model.model.language_model.layers[1].mlp, "backward", partial(strike.at, "backward"))
    module, after_backward = engine_of(engine, model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoints = Checkpoints(folder, strike)
    for step in range(checkpoints.restore(model, optimizer), STEPS):
        strike.begin(step)
        module(**batch(step, mesh.get_local_rank("dp"))).loss.backward()
        after_backward()
        strike.at("update")
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            checkpoints.save(model, optimizer, step + 1)
    digest = hashlib.sha256()
    for tensor in [
        *model.state_dict().values(),
        *(v for p in _parameters(optimizer) for v in optimizer.state[p].values()),
    ]:
        digest.update(_local(tensor).detach().numpy().tobytes())
    return digest.hexdigest()
