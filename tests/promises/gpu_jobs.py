"""What ranks do for test_gpu.py: models whose head dims the kernels exist for, wrapped, beside themselves unwrapped."""

from __future__ import annotations

import copy
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

import triton_sp
from triton_sp.ops.dispatch import implementation
from triton_sp.testing import relative_error

Batch = dict[str, Tensor]
IMAGE = 2
TEXT = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 89, "use_cache": False}


def words(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 89, (length,), generator=generator) for length in lengths]


def llava() -> tuple[nn.Module, Batch]:
    """SigLIP with 2 heads of 72, Llama with 4 of 64; two samples of two images and none, padded on the left."""
    vision = hf.SiglipVisionConfig(
        hidden_size=144, intermediate_size=144, num_hidden_layers=2, num_attention_heads=2, image_size=36, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    text = hf.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **TEXT)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    picture = torch.full((81,), IMAGE)
    a, b, c = words(7, 20, 33)
    first, second = torch.cat([a, picture, b, picture]), torch.cat([c])
    ids = torch.stack([first, torch.cat([torch.zeros(len(first) - len(second), dtype=torch.long), second])])
    mask = (ids != 0).long()
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(2, 3, 36, 36)}
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa"), batch


def qwen2_5_vl() -> tuple[nn.Module, Batch]:
    """2 heads of 80 in windows and whole images; 4 query and 2 key/value heads of 64."""
    vision = {
        "depth": 2, "hidden_size": 160, "num_heads": 2, "intermediate_size": 160, "out_hidden_size": 256,
        "patch_size": 4, "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
    text = hf.Qwen2_5_VLTextConfig(num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, **TEXT)
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text.to_dict(), image_token_id=IMAGE, video_token_id=1,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    grid = torch.tensor([[1, 20, 26]])
    a, b = words(9, 40)
    ids = torch.cat([a, torch.tensor([3]), torch.full((130,), IMAGE), torch.tensor([4]), b])[None]
    batch = {
        "input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "image_grid_thw": grid,
        "pixel_values": torch.randn(520, 3 * 2 * 16), "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa"), batch


def odd_heads() -> tuple[nn.Module, Batch]:
    """3 heads of 64: with two ranks each has a half of one."""
    config = hf.LlamaConfig(num_attention_heads=3, num_key_value_heads=3, head_dim=64, **(TEXT | {"hidden_size": 192}))
    (ids,) = words(301)
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model, {"input_ids": ids[None], "labels": ids[None]}


MODELS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "odd_heads": odd_heads}


class Errors(NamedTuple):
    """Relative errors against fp32 of loss and of all gradients together: of the wrapped model, and of the model as it
    is in the same dtype; and what computed attention."""

    loss: float
    gradient: float
    plain_loss: float
    plain_gradient: float
    implementation: str


def step(model: nn.Module, batch: Batch, wrapped: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and all gradients, in fp32."""
    loss = model(**batch).loss
    loss.backward()
    if wrapped:
        triton_sp.sync_gradients(model)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(model.named_parameters())]
    return loss.detach().float(), torch.cat([grad.flatten().float() for grad in grads])


def parity(name: str, dtype: torch.dtype, device: str, backend: str) -> Errors:
    """On a rank that may share its GPU with the others."""
    if backend == "nccl":
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    place = torch.device(device)
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    batch = {key: x.to(place) for key, x in batch.items()}
    narrow = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    model = model.to(place).train()
    plain, wrapped = (copy.deepcopy(model).to(dtype) for _ in range(2))
    exact = step(model, batch)
    usual = step(plain, narrow)
    group = dist.new_group(backend="nccl") if backend == "nccl" else None
    triton_sp.wrap(wrapped, group, config=triton_sp.SPConfig(plan="heads"))
    found = step(wrapped, narrow, wrapped=True)
    errors = [relative_error(x, right) for result in (found, usual) for x, right in zip(result, exact, strict=True)]
    return Errors(*errors, implementation(place))
