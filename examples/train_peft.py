"""LoRA with PEFT, in a plain loop. Run, where peft is installed: torchrun --nproc-per-node 2 examples/train_peft.py"""

import os

import tiny
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import triton_sp

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

torch.manual_seed(0)  # adapters are drawn, the same on every rank
model = get_peft_model(tiny.model().to(device), LoraConfig(r=8, target_modules="all-linear"))
triton_sp.wrap(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for batch in triton_sp.share_batches(DataLoader(tiny.samples(64), batch_size=4)):
    loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
    loss.backward()
    triton_sp.sync_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
