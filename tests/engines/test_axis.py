"""An axis of accelerate's mesh as the group: a ParallelismConfig with `cp_size`, and FSDP2 over all axes."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trainer_jobs
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from kit import zoo
from kit.parity import weights_error
from torch import nn
from torch.utils.data import DataLoader

import triton_sp
from triton_sp.errors import InputError
from triton_sp.ranks import collectives
from triton_sp.testing import RankError


def claim_devices() -> None:
    """accelerate takes a ParallelismConfig on any devices but CPUs: it is told that these processes have others."""
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def axes(size: int = 2) -> ParallelismConfig:
    return ParallelismConfig(cp_size=size, dp_shard_size=dist.get_world_size() // size)


def model_and_data() -> tuple[nn.Module, list[Any]]:
    """accelerate takes the mean of the batches' losses: all have as many labels."""
    data = [row for row in trainer_jobs.samples(8) if "pixel_values" in row][:4]
    for row in data:
        row["labels"][:-4] = -100
        row["labels"][-4:] = row["input_ids"][-4:]
    return zoo.CASES["llava"].model(torch.float32), data


def error_of(model: nn.Module, reference: nn.Module, before: dict[str, Any]) -> float:
    return weights_error({name: x.full_tensor() for name, x in model.state_dict().items()}, reference, before)


def train_in_a_loop() -> tuple[float, int]:
    """The worst relative error of the weights, and the number of exchanges."""
    model, data = model_and_data()
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    trainer_jobs.by_hand(reference, data, 1, dist.get_world_size() // 2)
    with trainer_jobs.as_torchrun(), collectives.record() as ledger:
        claim_devices()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        steps = trainer_jobs.ACCUMULATION
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=steps, parallelism_config=axes(), fsdp_plugin=plugin
        )
        group = accelerator.torch_device_mesh["cp"]
        triton_sp.wrap(model, group)
        triton_sp.share_batches(accelerator, group)
        optimizer = torch.optim.SGD(model.parameters(), lr=trainer_jobs.RATE)
        loader = DataLoader(data, batch_size=1, collate_fn=trainer_jobs.collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for _ in range(trainer_jobs.EPOCHS):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        return error_of(model, reference, before), ledger.count("exchange")


def train_by_trainer() -> tuple[float, int]:
    """The worst relative error of the weights, and the number of exchanges."""
    from transformers import Trainer, TrainingArguments

    model, data = model_and_data()
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    trainer_jobs.by_hand(reference, data, 1, dist.get_world_size() // 2)
    options = {"optim": "sgd", "num_train_epochs": trainer_jobs.EPOCHS, "save_strategy": "no"}
    layers = ["LlamaDecoderLayer", "CLIPEncoderLayer"]  # the model names more classes than it has
    fsdp = {"version": 2, "cpu_ram_efficient_loading": False, "transformer_layer_cls_to_wrap": layers}
    options |= {"fsdp": True, "fsdp_config": fsdp}
    with trainer_jobs.as_torchrun(), collectives.record() as ledger, tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **(trainer_jobs.LIKE_BY_HAND | options), parallelism_config=axes())
        claim_devices()
        trainer = Trainer(model, arguments, trainer_jobs.collate, train_dataset=data)
        group = trainer.accelerator.torch_device_mesh["cp"]
        triton_sp.wrap(model, group)
        triton_sp.share_batches(trainer, group)
        trainer.train()
        return error_of(trainer.model_wrapped, reference, before), ledger.count("exchange")


@pytest.mark.parametrize("train", [train_in_a_loop, train_by_trainer])
@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.long), 2])
def test_weights(ranks, train: Any, groups: int) -> None:
    for error, exchanges in ranks.run(train, ranks=2 * groups):
        assert error < 1e-4
        assert exchanges > 0, "the work was shared out"


def give_another_group(prepared: bool) -> None:
    with trainer_jobs.as_torchrun():
        claim_devices()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator = Accelerator(cpu=True, parallelism_config=axes(), fsdp_plugin=plugin)
        group = None
        if prepared:
            model = zoo.CASES["llava"].model(torch.float32)
            accelerator.prepare(model, torch.optim.SGD(model.parameters()))
            group = accelerator.torch_device_mesh["cp"]
        triton_sp.share_batches(accelerator, group)


@pytest.mark.parametrize(("prepared", "field"), [(False, "group"), (True, "accelerator")])
def test_refusals(ranks, prepared: bool, field: str) -> None:
    """Another group than the axis; and an accelerator whose own context parallelism is on the model already."""
    with pytest.raises(RankError) as raised:
        ranks.run(give_another_group, prepared, ranks=2 if prepared else 4)
    for error in raised.value.errors.values():
        assert isinstance(error, InputError) and error.field == field
