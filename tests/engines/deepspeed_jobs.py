"""Jobs for DeepSpeed: train with each ZeRO stage, and load what was saved on another number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import test_engines
import torch
import torch.distributed as dist
from kit import zoo
from kit.launch import torchrun_environment
from kit.parity import weights_error

import triton_sp

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_force_ds_cpu_optimizer": False,  # it would be compiled here
}
# The same where a Trainer says how large batches are.
AUTO = CONFIG | dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto"
)


@contextmanager
def deepspeed() -> Iterator[Any]:
    """DeepSpeed on the CPU, with torchrun's environment; what it keeps of a process group is taken away again."""
    with torchrun_environment(DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error"):
        import deepspeed
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.utils import groups

        try:
            yield deepspeed
        finally:
            groups.mpu = groups._WORLD_GROUP = deepspeed.comm.comm.cdb = None
            parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


def start(deepspeed: Any, model: torch.nn.Module, stage: int, mpu: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=test_engines.RATE)
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def whole_weights(deepspeed: Any, engine: Any) -> dict[str, torch.Tensor]:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: value.detach().clone() for name, value in parameters.items()}


def divide(deepspeed: Any, whose: str) -> tuple[Any, Any]:
    """Two ranks a group: what `wrap` is given, and what DeepSpeed is."""
    if whose == "deepspeed":
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
            parallel_state_sp.initialize_sequence_parallel(2)
        return parallel_state_sp, parallel_state_sp
    group = dist.new_subgroups(2)[0]
    mpu = triton_sp.mpu(group) if whose == "triton_sp" else None
    return mpu or group, mpu


def train(name: str, whose_mpu: str) -> dict[int, float]:
    """By ZeRO stage the worst relative difference of a weight's change, against one process."""
    case, size = zoo.CASES[name], dist.get_world_size()
    model, errors = case.model(torch.float32), {}
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    inputs = test_engines.batches(case)[: size // 2]
    test_engines.train(reference, inputs)
    with deepspeed() as library:
        for stage in (0, 1, 2, 3):
            copied = copy.deepcopy(model)
            group, mpu = divide(library, whose_mpu)
            # With its own mpu stages 0 to 2 add over the group, and 3 averages.
            adds = whose_mpu == "deepspeed" and stage < 3
            triton_sp.wrap(copied, group, triton_sp.SPConfig(gradient="sum" if adds else "mean"))
            engine = start(library, copied, stage, mpu)
            for _ in range(test_engines.STEPS):
                engine.backward(engine(**inputs[dist.get_rank() // 2]).loss)
                engine.step()
            errors[stage] = weights_error(whole_weights(library, engine), reference, before)
    return errors


def save(name: str, stage: int, folder: str) -> float:
    """Train a step, save, and return the loss after it."""
    case = zoo.CASES[name]
    batch = test_engines.batches(case)[0]
    with deepspeed() as library:
        mpu = triton_sp.mpu()
        engine = start(library, triton_sp.wrap(case.model(torch.float32), mpu), stage, mpu)
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.save_checkpoint(folder, tag="last")
        with torch.no_grad():
            return float(engine(**batch).loss)


def load(name: str, stage: int, folder: str) -> float:
    """The loss of what was saved, in a group of another size: weights only, as ZeRO's state depends on the world's."""
    case = zoo.CASES[name]
    with deepspeed() as library:
        state = library.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder, tag="last")
        model = case.model(torch.float32)
        model.load_state_dict(state)
        mpu = triton_sp.mpu()
        engine = start(library, triton_sp.wrap(model, mpu), stage, mpu)
        with torch.no_grad():
            return float(engine(**test_engines.batches(case)[0]).loss)


def load_unwrapped(name: str, folder: str) -> float:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = zoo.CASES[name]
    model = case.model(torch.float32)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="last"))
    with torch.no_grad():
        return float(model(**test_engines.batches(case)[0]).loss)
