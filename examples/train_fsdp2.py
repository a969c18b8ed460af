"""FSDP2 with weights divided over all ranks, 2 of which share each batch.

Run: torchrun --nproc-per-node 2 examples/train_fsdp2.py
"""

import os

import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import triton_sp

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
groups = int(os.environ["WORLD_SIZE"]) // 2
mesh = init_device_mesh(device.type, (groups, 2), mesh_dim_names=("dp", "sp"))
everyone = mesh._flatten()

model = triton_sp.wrap(tiny.model().to(device), mesh)  # or after fully_shard
for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
    for layer in layers:
        fully_shard(layer, mesh=everyone)
fully_shard(model, mesh=everyone)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

data = tiny.samples(64)
sampler = DistributedSampler(data, num_replicas=groups, rank=mesh.get_local_rank("dp"))  # a part for each group
for batch in triton_sp.share_batches(DataLoader(data, batch_size=4, sampler=sampler), mesh):
    loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
