"""What the engines' examples train: a tiny LLaVA with random weights, on random pictures that have something to say."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, SIDE, PATCH, TEXT = 1, 56, 14, 24  # a token, pixels, pixels, tokens


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    stack = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **stack)
    text = LlamaConfig(vocab_size=64, **stack)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))


def samples(count: int) -> list[dict[str, Tensor]]:
    """One picture each, and the numbers that it is made of."""
    rows = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed % 4)
        words = torch.randint(2, 64, (TEXT,), generator=generator)
        picture = words[:3, None, None].expand(3, SIDE, SIDE) / 64 + 0.1 * torch.randn(3, SIDE, SIDE)
        ids = torch.cat([torch.full(((SIDE // PATCH) ** 2,), IMAGE), words])
        rows.append({"pixel_values": picture, "input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)})
    return rows
