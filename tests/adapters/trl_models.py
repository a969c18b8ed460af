"""Models with random weights, and sentences, for the trainers of other packages: nothing is fetched."""

from __future__ import annotations

import torch
from tiny import PATCH, SIDE, WORDS, tokenizer
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

STACK = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer()), num_key_value_heads=2, pad_token_id=0, eos_token_id=2, **STACK)
    return _noisy(LlamaForCausalLM(config))


def vision_language_model() -> nn.Module:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=len(tokenizer()), num_key_value_heads=2, pad_token_id=0, eos_token_id=2, **STACK)
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **STACK)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    return _noisy(LlavaForConditionalGeneration(config))


def _noisy(model: nn.Module) -> nn.Module:
    """Norms and biases with something to learn of their own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def sentence(seed: int, length: int) -> str:
    picks = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(pick)] for pick in picks)
