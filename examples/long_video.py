"""One step on a video of 64 frames, on any number of ranks. Run: torchrun --nproc-per-node 2 examples/long_video.py"""

import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import triton_sp
from triton_sp.testing import saved_activations

FRAMES, SIDE, START, END, VIDEO = 64, 8, 60, 61, 62  # Qwen3-VL joins two frames; SIDE: patches; and three token ids

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
stack = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_attention_heads": 4, "num_hidden_layers": 4}
vision = {**stack, "depth": 4, "out_hidden_size": 64, "deepstack_visual_indexes": [1], "num_position_embeddings": 64}
text = {**stack, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
ids = {"video_token_id": VIDEO, "image_token_id": 63, "vision_start_token_id": START, "vision_end_token_id": END}
torch.manual_seed(0)
model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **ids)).to(device)
triton_sp.wrap(model, None, triton_sp.SPConfig(chunked_loss=True))

grid = torch.tensor([[FRAMES // 2, SIDE, SIDE]])
words = torch.randint(0, 60, (1, 32))
frame = torch.tensor([[START] + [VIDEO] * (SIDE * SIDE // 4) + [END]])
tokens = torch.cat([*[frame] * (FRAMES // 2), words], 1)
batch = {
    "pixel_values_videos": torch.randn(int(grid.prod()), 3 * 2 * 16 * 16),
    "video_grid_thw": grid,
    "input_ids": tokens,
    "mm_token_type_ids": 2 * (tokens == VIDEO),
    "labels": tokens.masked_fill(tokens >= 60, -100),
}
(batch,) = triton_sp.share_batches(DataLoader([batch], batch_size=None), model=model)  # each rank gets its patches
with saved_activations(model) as kept:
    loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
loss.backward()
if dist.get_rank() == 0:
    pixels, kept_mib = batch["pixel_values_videos"].nbytes / 2**20, kept[0] / 2**20
    print(f"P = {dist.get_world_size()}: loss {loss.item():.6f}", end="; ")
    print(f"{kept_mib - pixels:.1f} MiB kept for the backward, and pixels, {pixels:.1f} MiB")
    print("\n".join(line for line in str(triton_sp.explain(model)).splitlines() if line.startswith("last batch")))
dist.destroy_process_group()
