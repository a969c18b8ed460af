"""DDP over groups of 2 ranks that share each batch. Run: torchrun --nproc-per-node 4 examples/train_ddp.py"""

import os

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import triton_sp

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
groups = int(os.environ["WORLD_SIZE"]) // 2
mesh = init_device_mesh(device.type, (groups, 2), mesh_dim_names=("dp", "sp"))

model = triton_sp.wrap(tiny.model().to(device), mesh)
engine = DistributedDataParallel(model, find_unused_parameters=True)  # LLaVA does not use its tower's last layer
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

data = tiny.samples(64)
sampler = DistributedSampler(data, num_replicas=groups, rank=mesh.get_local_rank("dp"))  # a part for each group
for batch in triton_sp.share_batches(DataLoader(data, batch_size=4, sampler=sampler), mesh):
    loss = engine(**{name: x.to(device) for name, x in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
