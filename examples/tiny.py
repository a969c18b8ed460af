"""What the engines' examples train: a tiny LLaVA with random weights, on random pictures that have something to say."""

from __future__ import annotations

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE, SIDE, PATCH, TEXT = 1, 56, 14, 24  # a token, pixels, pixels, tokens
WORDS = [f"w{i}" for i in range(58)]
CHAT = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}"
    "{% endif %}<eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


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


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: the model's 64."""
    words = ["<pad>", "<image>", "<eos>", "<unk>", "user", "assistant", *WORDS]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, additional_special_tokens=["<image>"], chat_template=CHAT, **special
    )


def processor() -> LlavaProcessor:
    """For trainers that are given conversations and pictures."""
    from transformers import CLIPImageProcessorPil  # not in the oldest versions that the other examples run with

    size = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    counted = {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}  # CLIP's class token
    return LlavaProcessor(pictures, tokenizer(), patch_size=PATCH, chat_template=CHAT, **counted)


def photograph(number: int) -> Image.Image:
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversation(number: int) -> dict[str, list]:
    """A picture, and a question about it: which one it is."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w0 w1"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": f"w2 {WORDS[3 + number]}"}]}
    return {"images": [photograph(number)], "messages": [question, answer]}
