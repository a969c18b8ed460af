"""DeepSpeed with ZeRO 3 over all ranks, 2 of which share each batch.

Run, where DeepSpeed is installed: torchrun --nproc-per-node 2 examples/train_deepspeed.py
On a CPU set DS_ACCELERATOR=cpu.
"""

import deepspeed
import tiny
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

import triton_sp

deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
mpu = triton_sp.mpu(dist.new_subgroups(2)[0])

model = triton_sp.wrap(tiny.model(), mpu)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)

data = tiny.samples(64)
sampler = DistributedSampler(data, num_replicas=mpu.get_data_parallel_world_size(), rank=mpu.get_data_parallel_rank())
for batch in triton_sp.share_batches(DataLoader(data, batch_size=4, sampler=sampler), mpu):
    loss = engine(**{name: x.to(engine.device) for name, x in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
