"""What structure cannot tell about models, by the name of their kind: the only file that knows a model's name."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from triton_sp.anatomy.parts import FeatureMethod, Spans, Stack, is_hf


@dataclass(frozen=True)
class Family:
    """What can't be read off a part's structure, by the `model_type` of its configuration."""

    whole: str = ""  # why the tower stays whole on every rank
    joins_images: bool = False  # the tower packs images of the sizes that it is given, and masks one from the other


FAMILIES: dict[str, Family] = {
    "mllama_vision_model": Family(whole="it has two stacks, and its masks are not those of padded images"),
    "pixtral": Family(joins_images=True),
    "janus_vqgan": Family(whole="it makes pixels, and no features"),
    "apertus1p5_vision_tokenizer": Family(whole="its stages are convolutions, of which some attend"),
    "lfm3_vl_vision": Family(whole="it has convolutions along images between its blocks"),
    **dict.fromkeys(
        ("sam_vision_model", "got_ocr2_vision", "deepseek_ocr2_sam_vision_model"),
        Family(whole="its blocks work on the grid of an image, and add what depends on places in it"),
    ),
    **dict.fromkeys(
        ("minicpmv4_6_vision", "minicpmv4_7_vision", "minicpm_ocr_vision"),
        Family(whole="a merger between its blocks leaves fewer tokens"),
    ),
}

# Towers and decoders whose loss and gradients are compared with one process's, see tests/kit/zoo.py. Others are
# accepted by their structure.
PROVEN = {
    # vision towers; the model_type of some is another one in some versions of transformers
    "clip_vision_model", "dinov2", "glm4v_vision", "idefics2", "idefics2_vision", "idefics3_vision", "internvl_vision",
    "pixtral", "qwen2_vl_vision", "qwen2_vl", "qwen2_5_vl_vision", "qwen2_5_vl", "qwen3_vl_vision", "qwen3_vl",
    "qwen3_vl_moe_vision", "qwen3_vl_moe", "qwen3_5_vision", "qwen3_5_moe_vision", "siglip_vision_model",
    "siglip2_vision_model", "smolvlm_vision", "vit",
    # decoders
    "gemma", "gemma2", "gemma3_text", "glm4v_text", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen2_vl_text",
    "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text",
    # decoders whose attention or positions are special
    "deepseek_v2", "deepseek_v3", "ernie4_5_vl_moe_text", "gemma4_text", "gpt2", "gpt_oss", "llama4_text",
    "mllama_text_model", "molmo2_text", "opt",
    # their towers
    "ernie4_5_vl_moe_vision", "gemma4_vision", "kimi_k25_vision", "llama4_vision_model", "molmo2_vision",
    # decoders with recurrent layers
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip

# Arguments with a type for each token: of text or of a picture, or which experts it has (ERNIE 4.5 VL).
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")

# Composite models of which the same holds for their fusion, by the `model_type` of their configuration.
PROVEN_COMPOSITES = {
    "ernie4_5_vl_moe", "gemma3", "gemma4", "glm4v", "idefics2", "idefics3", "internvl", "kimi_k25", "llama4", "llava",
    "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm",
}  # fmt: skip

# How a composite's features are made and where they go, where it does not keep to transformers' convention (fusion.py):
# these put features among the text by code of their own, which counts them too.
FEATURE_METHODS: dict[str, tuple[FeatureMethod, ...]] = dict.fromkeys(
    ("idefics2", "idefics3", "smolvlm"),
    (FeatureMethod("get_image_features", "image_token_id", "images", per_sample=True),),
)
# Its decoder adds them, in several layers.
FEATURE_METHODS["granite4_vision"] = (FeatureMethod("get_image_features", "image_token_id", "images"),)

# By the `model_type` of a composite's configuration: the masks that it makes for its decoder.
SPANS: dict[str, Spans] = {
    "gemma3": Spans((1,), cut=True),  # an image
    # Images and videos; only where the decoder's configuration says so.
    "gemma4": Spans((1, 2), cut=True, types="mm_token_type_ids", causal_layers="full_attention"),
    "gemma4_unified": Spans((1, 2), types="mm_token_type_ids"),
    # Images that follow one another directly; in a row all see one another.
    "molmo2": Spans((1,), single=True, types="mm_token_type_ids"),
    "paligemma": Spans((0,), single=True, required=True),  # the prefix: image and prompt
}

# What makes them in Gemma 3 and 4 since transformers 5.16. In 5.10, which has not got it, images see each other in
# another way: by these rules the loss was off 0.3 %, and gradients 16 to 95 % (measured).
MAKES_SPANS = "create_masks_for_vision_model"


def spans_of(entry: nn.Module, decoder: nn.Module) -> Spans | None:
    """The masks that the innermost model around a decoder makes for it, as transformers >= 5 composes them: before,
    sliding windows met spans another way, which is refused then."""
    around: list[Any] = [
        m for m in entry.modules() if is_hf(m) and m is not decoder and any(part is decoder for part in m.modules())
    ]
    spans = SPANS.get(around[-1].config.model_type) if around else None
    if spans is None or not _makes_spans(around[-1]):
        return None
    config: Any = decoder.config
    whom = getattr(config, "use_bidirectional_attention", None)  # "vision", or True or "all": then it isn't causal
    if hasattr(config, "use_bidirectional_attention") and spans.types == "mm_token_type_ids" and whom is None:
        return replace(spans, token_types=())
    # PaliGemma sets it for its prefix, which the span is; it makes causal masks all the same.
    return spans if spans.required or whom in (None, False, "vision") else None


def _makes_spans(composite: Any) -> bool:
    """Whether the installed transformers makes this composite's masks as `SPANS` says."""
    from transformers import masking_utils

    if composite.config.model_type.startswith(("gemma3", "gemma4")):
        return hasattr(sys.modules[type(composite).__module__], MAKES_SPANS)
    return hasattr(masking_utils, "blockwise_overlay")


def expected_window(attention: nn.Module) -> int | None:
    """The sliding window that a decoder's mask would apply in the layer of this attention module."""
    window, kind = getattr(attention.config, "sliding_window", None), layer_type(attention)
    return window if kind in (None, "sliding_attention") else None


def layer_type(attention: nn.Module) -> str | None:
    """The type of the layer of an attention module, as its configuration has it."""
    kinds, index = getattr(attention.config, "layer_types", None), getattr(attention, "layer_idx", None)
    return kinds[index] if kinds and index is not None else None


def layer_config(attention: nn.Module) -> Any:
    """The configuration of the layer of an attention module, where layers have heads of their own (Gemma 4), or the one
    of all layers."""
    config: Any = getattr(attention, "config", None)
    index = getattr(attention, "layer_idx", None)
    by_layer = None if index is None else getattr(config, "per_layer_config", None)
    return config if by_layer is None else by_layer[index]


def numbers_its_tokens(attention: nn.Module) -> bool:
    """Whether an attention module numbers its tokens itself, by `torch.arange`: Llama 4 scales queries by it."""
    config: Any = attention.config
    return config.model_type == "llama4_text"


def first_positions(
    decoder: Stack, ids: torch.Tensor | None, mask: torch.Tensor | None, length: int, device: torch.device
) -> torch.Tensor:
    """(1 or B, S), the positions that a decoder gives to tokens by itself: their number in the row, or (OPT) in the
    mask, where padding is -1, or (RoBERTa) among the ids that are not padding's."""
    method = f"create_position_ids_from_{'inputs_embeds' if ids is None else 'input_ids'}"
    for module in decoder.outside:
        if hasattr(module, method):
            given = torch.empty(1, length, 1, device=device) if ids is None else ids
            return getattr(module, method)(given, module.padding_idx)  # type: ignore[no-any-return]
    if mask is None or "cumsum" not in inspect.unwrap(type(decoder.module).forward).__code__.co_names:
        return torch.arange(length, device=device)[None]
    mask = mask.long()
    return mask.cumsum(1) * mask - 1


def joins_images(tower: Stack) -> bool:
    """Whether a tower makes one sequence of images of different sizes without telling its blocks where each begins."""
    return FAMILIES.get(tower.family, Family()).joins_images


def cu_seqlens_of_joined_images(tower: Stack, arguments: dict[str, Any]) -> torch.Tensor:
    """cu_seqlens of the patches of such images, from the arguments of the tower."""
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    sizes = [pixels.shape[-2:]] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
    module: Any = tower.module
    lengths = [(height // module.patch_size) * (width // module.patch_size) for height, width in sizes]
    return torch.tensor([0, *lengths], device=pixels.device).cumsum(0).to(torch.int32)


def first_position(composite: nn.Module) -> int:
    """The position of a sequence's first token, where a composite model numbers them itself."""
    config: Any = composite.config
    return 1 if config.model_type == "paligemma" else 0
