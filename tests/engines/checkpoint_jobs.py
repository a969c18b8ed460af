"""Jobs that train a few steps, save, and go on in other rank processes, on another number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import trainer_jobs
from kit import zoo
from kit.parity import weights_error
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_sp

RATE, MOMENTUM, STEPS = 0.05, 0.9, 6


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def engine_of(engine: str, model: nn.Module) -> nn.Module:
    """The model as an engine has it, wrapped; on one rank the model itself."""
    if dist.get_world_size() == 1:
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if engine == "fsdp2":
        for layer in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
            for block in layer:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    triton_sp.wrap(model, mesh)
    return DistributedDataParallel(model, find_unused_parameters=True) if engine == "ddp" else model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, averages: bool) -> None:
    """Some of the steps of a training; each has a batch of its own."""
    case = zoo.CASES["qwen2_5_vl"]
    for step in numbers:
        batch = case.batch(["left_pad", "image_and_video"][step % 2], torch.float32)
        model(**batch).loss.backward()
        if averages:
            triton_sp.sync_gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def go_on(engine: str, folder: Path, first: int, stop: int) -> float:
    """Load what was saved before step `first`, train until `stop` and save; the error of the weights against a training
    that was not interrupted, in one process."""
    model = zoo.CASES["qwen2_5_vl"].model(torch.float32)
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    steps(reference, optimizer_of(reference), range(stop), averages=False)
    if first:
        for parameter in model.parameters():  # what is right afterwards has been loaded
            nn.init.zeros_(parameter)
    model = engine_of(engine, model)
    optimizer = optimizer_of(model)
    if first:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    steps(model, optimizer, range(first, stop), engine == "loop" and dist.get_world_size() > 1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder / str(stop))
    return weights_error(states["model"], reference, before)


class Counted(torch.utils.data.Dataset[Any]):
    """Samples, and how often this process has read one."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.rows[index]


def resume(folder: Path, first: int, stop: int, engine: dict[str, Any]) -> tuple[float, int]:
    """A Trainer that resumes from its checkpoint at step `first`, and saves and stops at `stop`. The error of the
    weights against a training that was not interrupted, and how many samples this rank has read."""
    from transformers import Trainer, TrainingArguments

    model, data = zoo.CASES["llava"].model(torch.float32), Counted(trainer_jobs.samples(5))
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    trainer_jobs.by_hand(reference, data.rows, 1, 1, MOMENTUM, stop)
    size, saved = dist.get_world_size(), folder / f"checkpoint-{first}"
    if first:  # see docs/checkpoints.md: a Trainer does not find the weights of composites by itself
        model = type(model).from_pretrained(saved, attn_implementation=model.config._attn_implementation).train()
    with trainer_jobs.as_torchrun():
        arguments = TrainingArguments(
            str(folder),
            **(trainer_jobs.LIKE_BY_HAND | engine),
            max_steps=stop,
            save_strategy="steps",
            save_steps=stop,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=trainer_jobs.RATE, momentum=MOMENTUM)
        if size > 1:
            triton_sp.wrap(model, init_device_mesh("cpu", (size,)))
        trainer = Trainer(model, arguments, trainer_jobs.collate, train_dataset=data, optimizers=(optimizer, None))
        if size > 1:
            triton_sp.share_batches(trainer)
        data.reads = 0
        trainer.train(resume_from_checkpoint=str(saved) if first else None)
    return weights_error(model.state_dict(), reference, before), data.reads
