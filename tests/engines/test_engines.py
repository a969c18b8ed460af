"""Inside the engines that people train with: weights after several optimizer steps, against one process on all data.

On 4 ranks as 2 x 2: two groups of two ranks share a batch each, and the engine averages gradients over all four.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo
from kit.parity import weights_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_sp
from triton_sp.wrappers.layers.rotation import NORMALISED

STEPS, RATE = 3, 0.1


def batches(case: tiny.Case) -> list[tiny.Batch]:
    """One for each data rank, in float32. They have as many labels as one another, so that the mean of losses is the
    loss."""
    first = case.batch("image_and_video" if "image_and_video" in case.batches else "left_pad", torch.float32)
    second = {key: value.clone() for key, value in first.items()}
    text = (second["labels"] != -100) & (second["labels"] >= tiny.FIRST_TEXT)
    second["input_ids"][text] = tiny.FIRST_TEXT + (second["input_ids"][text] + 7) % (tiny.VOCAB - tiny.FIRST_TEXT)
    second["labels"] = torch.where(second["labels"] == -100, -100, second["input_ids"])
    return [first, second]


def train(model: nn.Module, inputs: list[tiny.Batch], after_backward=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        for batch in inputs:
            (model(**batch).loss / len(inputs)).backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()


def run(name: str, engine: str) -> float:
    """The worst relative difference of a weight's change after training."""
    case = zoo.CASES[name]
    model = case.model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    inputs = batches(case)
    train(reference, inputs)

    data_ranks = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (data_ranks, 2), mesh_dim_names=("dp", "sp"))
    mine = [inputs[mesh.get_local_rank("dp")]] if data_ranks == 2 else inputs
    if engine == "loop":
        triton_sp.wrap(model, mesh)
        train(model, mine, lambda: triton_sp.sync_gradients(model))
    elif engine == "ddp":
        triton_sp.wrap(model, mesh)
        train(DistributedDataParallel(model, find_unused_parameters=True), mine)
    else:
        if engine == "fsdp_after":
            triton_sp.wrap(model, mesh)
        flat = mesh._flatten()
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=flat)
        fully_shard(model, mesh=flat)
        if engine == "fsdp_before":
            triton_sp.wrap(model, mesh)
        train(model, mine)

    assert (NORMALISED in triton_sp.explain(model).rotations) == (name == "qwen3_vl")
    return weights_error(model.state_dict(), reference, before)


@pytest.mark.parametrize(("name", "size"), [("qwen3_vl", 2), ("qwen2_5_vl", 4)])
@pytest.mark.parametrize("engine", ["loop", "ddp", "fsdp_before", "fsdp_after"])
def test_weights_after_training(ranks, engine: str, name: str, size: int) -> None:
    """Windows of images, and norms that are done where q and k are packed, with weights that an engine gathers."""
    assert max(ranks.run(run, name, engine, ranks=size)) < 2e-4
