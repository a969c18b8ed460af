"""What the demo trains: two small vision-language models with random weights, and three real photographs with captions.

The models are transformers' own classes. The photographs ship with matplotlib and scikit-learn, and go through
transformers' own image processors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.cbook
import sklearn.datasets
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HEADS, HEAD_DIM, KV_HEADS = 4, 64, 2
WIDTH = HEADS * HEAD_DIM
PAD, START, END, IMAGE, VIDEO, EOS = (
    "<|pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image|>",
    "<|video|>",
    "<|end|>",
)

QUESTION = "Describe the picture.\n"
CAPTIONS = {
    "china.jpg": "A tall pavilion with curved, tiled roofs stands behind trees in a Chinese palace garden.",
    "flower.jpg": "A dahlia in full bloom: its narrow petals go from orange-red at the rim to yellow in the middle.",
    "grace_hopper.jpg": "Rear Admiral Grace Hopper, computer scientist, in navy uniform before the flag.",
}
ROWS = (("china.jpg", "flower.jpg"), ("grace_hopper.jpg",))  # the photographs of each row of the batch, in this order


@dataclass(frozen=True)
class Job:
    """A model and the batch it trains on.

    Attributes:
        vision_probe, text_probe: token-wise modules of the first layers; what comes in are the tokens of the rank.
        photographs: how the batch was made, in words.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    vision_probe: str
    text_probe: str
    photographs: str


def jobs() -> list[Job]:
    return [qwen_job(), llava_job()]


def photographs() -> dict[str, Image.Image]:
    samples = sklearn.datasets.load_sample_images()
    china, flower = (Image.fromarray(pixels) for pixels in samples.images)
    hopper = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return {"china.jpg": china, "flower.jpg": flower, "grace_hopper.jpg": hopper}


def image_processor(name: str, **options: Any) -> Any:
    """transformers' image processor on Pillow, or in versions that have no such thing, its only one."""
    return getattr(hf, f"{name}Pil" if hasattr(hf, f"{name}Pil") else name)(**options)


def tokenizer() -> Any:
    """A byte-level BPE tokenizer, trained on the captions."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, START, END, IMAGE, VIDEO, EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([QUESTION, *CAPTIONS.values()], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, padding_side="right")


def text_batch(tokens_per_picture: dict[str, int], words: Any) -> dict[str, Tensor]:
    """Ids, mask and labels; each picture stands for as many placeholders as the tower makes features of it. Only the
    captions are learned."""
    rows: list[tuple[list[int], list[int]]] = []
    for names in ROWS:
        ids: list[int] = []
        labels: list[int] = []
        for name in names:
            prompt = words.encode(START + IMAGE * tokens_per_picture[name] + END + QUESTION)
            caption = words.encode(CAPTIONS[name] + EOS)
            ids += prompt + caption
            labels += [-100] * len(prompt) + caption
        rows.append((ids, labels))
    batch = words.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    padded = [labels + [-100] * (length - len(labels)) for _, labels in rows]
    return {**batch, "labels": torch.tensor(padded)}


def text_options(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 8192,
        "use_cache": False,
        "pad_token_id": words.convert_tokens_to_ids(PAD),
        "bos_token_id": words.convert_tokens_to_ids(START),
        "eos_token_id": words.convert_tokens_to_ids(EOS),
    }


def seeded(model: str, config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return getattr(hf, model)(config).train()

    return build


def qwen_job() -> Job:
    """Qwen2.5-VL: every photograph at its own resolution, in patches of 14x14 pixels, four of which become a token."""
    words, pictures = tokenizer(), photographs()
    images = list(pictures.values())
    pixels = image_processor("Qwen2VLImageProcessor")(images, return_tensors="pt")
    grids = pixels["image_grid_thw"]
    batch = text_batch(dict(zip(CAPTIONS, (grids.prod(-1) // 4).tolist(), strict=True)), words)
    # What Qwen's processor class does too, but that class needs torchvision.
    batch["mm_token_type_ids"] = (batch["input_ids"] == words.convert_tokens_to_ids(IMAGE)).int()

    vision = {"depth": 4, "hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 2 * WIDTH}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision | {"out_hidden_size": WIDTH, "window_size": 112, "fullatt_block_indexes": [1, 3]},
        text_config=text_options(words) | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        video_token_id=words.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=words.convert_tokens_to_ids(START),
        vision_end_token_id=words.convert_tokens_to_ids(END),
    )
    sizes = ", ".join(f"{name} {picture.width}x{picture.height}" for name, picture in pictures.items())
    return Job(
        "Qwen2.5-VL",
        seeded("Qwen2_5_VLForConditionalGeneration", config),
        {**batch, **pixels},
        "model.visual.blocks.0.mlp",
        "model.language_model.layers.0.mlp",
        f"{sizes}: {len(pixels['pixel_values']):,} patches",
    )


def llava_job(side: int = 392, patch: int = 14) -> Job:
    """LLaVA: a CLIP tower, whose CLS token is dropped after its last layer but one, and a Llama decoder."""
    words, pictures = tokenizer(), photographs()
    images = list(pictures.values())
    square = {"height": side, "width": side}
    processor = image_processor("CLIPImageProcessor", size={"shortest_edge": side}, crop_size=square)
    pixels = processor(images, return_tensors="pt")
    features = (side // patch) ** 2
    vision = {"num_hidden_layers": 5, "hidden_size": WIDTH, "num_attention_heads": HEADS, "image_size": side}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, intermediate_size=2 * WIDTH, patch_size=patch),
        text_config=hf.LlamaConfig(**text_options(words)),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        image_seq_length=features,
    )
    return Job(
        "LLaVA",
        seeded("LlavaForConditionalGeneration", config),
        {**text_batch(dict.fromkeys(CAPTIONS, features), words), **pixels},
        "model.vision_tower.encoder.layers.0.mlp",
        "model.language_model.layers.0.mlp",
        f"{len(images)} photographs cropped to {side}x{side}: {len(images) * (features + 1):,} patches and CLS tokens",
    )
