"""A trace and a picture of a step. Run: torchrun --nproc-per-node 2 examples/see_a_step.py"""

import os

import tiny
import torch
import torch.distributed as dist
from torch.utils.data import default_collate

import triton_sp

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
model = triton_sp.wrap(tiny.model().to(device), config=triton_sp.SPConfig(plan="heads"))
batch = {name: x.to(device) for name, x in default_collate(tiny.samples(32)).items()}
model(**batch).loss.backward()  # the first step also prepares what later ones find
with triton_sp.record_step(model, "reports/step") as timeline:
    model(**batch).loss.backward()
if dist.get_rank() == 0:
    print(timeline)
dist.destroy_process_group()
