"""The cases of the parity suite: tiny random-weight models of the classes of the installed transformers, and their
batches, made of what stands in tiny.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from kit import special
from kit.tiny import (
    EXPERTS,
    GRID,
    HEADS,
    IMAGE,
    LAYOUTS,
    LONGROPE,
    MERGE,
    MROPE,
    ONEVISION_GRID,
    ONEVISION_PINPOINTS,
    PATCH,
    ROPE,
    VIDEO,
    VISION_END,
    VISION_START,
    WIDTH,
    Batch,
    Case,
    Missing,
    Visuals,
    hf,
    onevision_visuals,
    pixels,
    qwen_visuals,
    text_case,
    text_config,
    tile_visuals,
    vision_case,
    vision_config,
    vlm_batch,
    vlm_case,
)


def qwen_cases() -> list[Case]:
    common = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH}
    qwen2 = common | {"depth": 2, "embed_dim": WIDTH, "mlp_ratio": 1}
    wide = common | {"depth": 3, "intermediate_size": 80, "out_hidden_size": WIDTH}
    # Windows of 2x2 merged tokens, ragged at the edges; the middle block sees whole images.
    qwen2_5 = wide | {"window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1]}
    qwen3 = wide | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text2 = text_config("Qwen2VLText", **{ROPE: MROPE})
    text2_5 = text_config("Qwen2_5_VLText", kv_heads=1, **{ROPE: MROPE})
    interleaved = {ROPE: MROPE | {"mrope_interleaved": True}}
    text3 = text_config("Qwen3VLText", layers=3, **interleaved)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    text3_moe = text_config("Qwen3VLMoeText", kv_heads=4, **interleaved, **experts)
    ids = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    # The experts' grouped product has no float64.
    moe = vlm_case("qwen3_vl_moe", "Qwen3VLMoe", (qwen3, text3_moe.to_dict(), qwen_visuals(frame_spans=True)), **ids)
    return [
        replace(moe, dtype=torch.float32),
        vlm_case("qwen2_vl", "Qwen2VL", (qwen2, text2.to_dict(), qwen_visuals()), **ids),
        vlm_case("qwen2_5_vl", "Qwen2_5_VL", (qwen2_5, text2_5.to_dict(), qwen_visuals()), **ids),
        # Its norms round to float32, and so does its tower's rotation.
        replace(
            vlm_case("qwen3_vl", "Qwen3VL", (qwen3, text3.to_dict(), qwen_visuals(frame_spans=True)), **ids),
            widened=True,
        ),
    ]


def llava_cases() -> list[Case]:
    clip = vision_config("CLIPVision", layers=3)
    clip_unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    clip_select = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    siglip = vision_config("SiglipVision", ONEVISION_GRID, vision_use_head=False)
    siglip_unused = ("model.vision_tower.post_layernorm.",)
    siglip_options = {"video_token_id": VIDEO, "image_grid_pinpoints": ONEVISION_PINPOINTS}
    clip_next, next_options = vision_config("CLIPVision", ONEVISION_GRID, layers=3), dict(siglip_options)
    del next_options["video_token_id"]
    next_visuals = {"image": onevision_visuals()["image"]}
    internvl = vision_config("InternVLVision", attention_bias=True)
    one_tile, tiles = tile_visuals([1, 1, 1, 1, 1], GRID**2), tile_visuals([5, 1, 3, 1, 1], GRID**2 // MERGE**2)
    return [
        vlm_case("llava", "Llava", (clip, text_config("Llama"), one_tile), clip_unused, **clip_select),
        vlm_case(
            "llava_next",
            "LlavaNext",
            (clip_next, text_config("Mistral", kv_heads=4, sliding_window=None), next_visuals),
            clip_unused,
            **clip_select,
            **next_options,
        ),
        vlm_case(
            "llava_onevision",
            "LlavaOnevision",
            (siglip, text_config("Qwen2"), onevision_visuals()),
            siglip_unused,
            **siglip_options,
        ),
        vlm_case("internvl", "InternVL", (internvl, text_config("Qwen2", kv_heads=1), tiles)),
    ]


def marked(recipe: Callable[[torch.dtype], Batch], prefix: bool, dtype: torch.dtype) -> Batch:
    """token_type_ids as the processors give them: 1 at Gemma 3's images; 0 in PaliGemma's prefix, which is each row's
    beginning up to its last image and some text, and has no labels."""
    batch = recipe(dtype)
    if not prefix:
        return batch | {"token_type_ids": (batch["input_ids"] == IMAGE).long()}
    width = batch["input_ids"].shape[1]
    last = (torch.arange(width) * (batch["input_ids"] == IMAGE)).amax(1, keepdim=True)
    first = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).argmax(1, keepdim=True)
    suffix = torch.arange(width) > torch.maximum(last, first) + 2
    if "attention_mask" in batch:
        suffix &= batch["attention_mask"].bool()
    return batch | {"token_type_ids": suffix.long(), "labels": batch["labels"].masked_fill(~suffix, -100)}


def span_case(name: str, model: str, parts: tuple[Any, Any, dict[str, Visuals]], **options: Any) -> Case:
    """Gemma's norms round to float32."""
    case = vlm_case(name, model, parts, **options)
    batches = {name: partial(marked, recipe, model == "PaliGemma") for name, recipe in case.batches.items()}
    return replace(case, batches=batches, suite=(2, 3), dtype=torch.float32)


def gemma_cases() -> list[Case]:
    siglip = vision_config("SiglipVision", vision_use_head=False)
    every, pooled = tile_visuals([1] * 5, GRID**2), tile_visuals([1] * 5, 9)
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "layers": 3}
    gemma1 = text_config("Gemma", kv_heads=1)
    gemma2 = text_config("Gemma2", sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    # 14 heads on 3 ranks: spans in fractions of heads.
    gemma3 = text_config("Gemma3Text", kv_heads=2, num_attention_heads=14, hidden_size=112, sliding_window=7, **layers)
    options = {"mm_tokens_per_image": 9, "boi_token_id": VISION_START, "eoi_token_id": VISION_END}
    paligemma2 = span_case("paligemma2", "PaliGemma", (siglip, gemma2, every), projection_dim=WIDTH, attention="eager")
    return [
        span_case("paligemma", "PaliGemma", (siglip, gemma1, every), projection_dim=WIDTH),
        replace(paligemma2, suite=(2,)),
        span_case("gemma3", "Gemma3", (siglip, gemma3, pooled), **options),
    ]


# Height and width in pixels of pictures that are padded to squares of GRID x GRID patches.
PADDED = [(GRID * PATCH, GRID * PATCH), (16, 24), (24, 12), (20, 8), (24, 16)]


def padded_batch(name: str, recipe: Callable[[torch.dtype], Batch], dtype: torch.dtype) -> Batch:
    """Idefics and SmolVLM take (B, most images of a sample, 3, H, W), padding of pictures and of samples 0."""
    batch = recipe(dtype)
    counts = [sum(item == "image" for item in layout) for layout in LAYOUTS[name]]
    if not sum(counts):
        return batch
    pictures, taken = iter(batch["pixel_values"]), iter(PADDED)
    values = torch.zeros(len(counts), max(counts), *batch["pixel_values"].shape[1:], dtype=dtype)
    mask = torch.zeros(values[:, :, 0].shape, dtype=torch.long)
    for row, count in enumerate(counts):
        for column in range(count):
            height, width = next(taken)
            values[row, column, :, :height, :width] = next(pictures)[:, :height, :width]
            mask[row, column, :height, :width] = 1
    return batch | {"pixel_values": values, "pixel_attention_mask": mask}


def padded_case(name: str, model: str, parts: tuple[Any, Any, dict[str, Visuals]], **options: Any) -> Case:
    case = vlm_case(name, model, parts, **options)
    batches = {layout: partial(padded_batch, layout, recipe) for layout, recipe in case.batches.items()}
    return replace(case, batches=batches, suite=(3, 4))


def padded_cases() -> list[Case]:
    vision = vision_config("SiglipVision").to_diff_dict()  # of the same fields
    vision.pop("model_type")
    shuffled, resampled = tile_visuals([1] * 5, GRID**2 // MERGE**2), tile_visuals([1] * 5, 7)
    perceiver = {"hidden_size": WIDTH, "resampler_n_latents": 7, "resampler_depth": 1, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    mistral = text_config("Mistral", sliding_window=None)
    idefics2 = padded_case("idefics2", "Idefics2", (vision, mistral, resampled), perceiver_config=perceiver)
    return [
        replace(idefics2, suite=(2,), dtype=torch.float32),  # its resampler rounds to that, on each rank
        padded_case("idefics3", "Idefics3", (vision, text_config("Llama"), shuffled), scale_factor=MERGE),
        padded_case("smolvlm", "SmolVLM", (vision, text_config("Llama"), shuffled), scale_factor=MERGE),
    ]


def pixtral_visuals() -> dict[str, Visuals]:
    """Pictures of any size in one tensor, padded at the right and the bottom."""
    grids = [(10, 14), (4, 6), (4, 12), (6, 6), (2, 10)]

    def inputs(count: int, dtype: torch.dtype) -> Batch:
        sizes = torch.tensor(grids[:count]) * PATCH
        height, width = sizes.amax(0).tolist()
        return {"pixel_values": pixels(count, 3, height, width, dtype=dtype, seed=count), "image_sizes": sizes}

    return {"image": Visuals([[height * width // MERGE**2] for height, width in grids], inputs)}


def frames_as_images(recipe: Callable[[torch.dtype], Batch], dtype: torch.dtype) -> Batch:
    """GLM-4V's placeholders are the same in images and in frames of videos, of which a batch has one or the other."""
    batch = recipe(dtype)
    return batch | {"input_ids": batch["input_ids"].where(batch["input_ids"] != VIDEO, IMAGE)}


def packed_cases() -> list[Case]:
    pixtral = vision_config("PixtralVision", grid=14)
    mistral = text_config("Mistral", sliding_window=None)
    case = vlm_case("mistral3", "Mistral3", (pixtral, mistral, pixtral_visuals()), spatial_merge_size=MERGE)
    glm = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH, "depth": 2}
    glm |= {"intermediate_size": 80, "out_hidden_size": WIDTH, "image_size": 8 * PATCH}
    text = text_config("Glm4vText", kv_heads=2, **{ROPE: MROPE})
    ids = {"video_token_id": VIDEO, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
    visuals = qwen_visuals(frame_spans=True)
    glm4v = vlm_case("glm4v", "Glm4v", (glm, text.to_dict(), {"image": visuals["image"]}), **ids)
    video = partial(frames_as_images, partial(vlm_batch, "video", visuals, True))
    return [
        replace(case, suite=(3, 4)),
        # Its position embeddings are interpolated in float32.
        replace(glm4v, batches={**glm4v.batches, "video": video}, suite=(2,), dtype=torch.float32),
    ]


# Whose features every rank gets whole: LLaVA-OneVision's, where the composite and not the method ends videos (5.17).
FEATURES_GATHERED: set[str] = set()
if "image_newline" not in inspect.unwrap(hf.LlavaOnevisionModel.get_video_features).__code__.co_names:
    FEATURES_GATHERED.add("llava_onevision")
# Their tower's blocks are not sharded: a merger between them leaves fewer tokens, or its masks are of another kind.
TOWER_WHOLE = {"minicpmv4_6": "by images", "mllama": "left whole"}


def odd_head_cases() -> list[Case]:
    """Head counts that no group of 2, 3 or 4 ranks divides, or whose query groups straddle ranks."""
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
    wide = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 28 * 8}
    return [
        vision_case("vit_25", "ViT", num_attention_heads=25, hidden_size=100),
        text_case("llama_28_4", "Llama", **wide),
        text_case("qwen2_28_4", "Qwen2", layers=3, sliding_window=7, **mixed, **wide),
        text_case("llama_5_1", "Llama", num_attention_heads=5, num_key_value_heads=1, hidden_size=40),
    ]


def vision_cases() -> list[Case]:
    return [
        vision_case("vit", "ViT"),
        vision_case("clip_vision", "CLIPVision"),
        vision_case("siglip_vision", "SiglipVision", ONEVISION_GRID),
        vision_case("dinov2", "Dinov2", unused=("embeddings.mask_token",)),
    ]


def text_cases() -> list[Case]:
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
    softcap = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return [
        text_case("llama", "Llama"),
        text_case("mistral", "Mistral", sliding_window=7, kv_heads=2, ranks=(1, 2, 4)),
        text_case("qwen2", "Qwen2", layers=3, sliding_window=7, **mixed),
        text_case("gemma", "Gemma", kv_heads=1),
        text_case("gemma2", "Gemma2", attention="eager", sliding_window=7, **softcap),  # sdpa leaves out the softcap
        text_case("phi3", "Phi3", num_attention_heads=2 * HEADS, hidden_size=2 * WIDTH),
        text_case("phi3_longrope", "Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16),
        text_case("gpt_neox", "GPTNeoX"),
    ]


# --- recurrent layers --------------------------------------------------------------------------------------------

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 4, "mamba_chunk_size": 16}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "layers": 3}


def hybrid(case: Case) -> Case:
    """The rules compute in float32 whatever the model's dtype is. Packed documents are apart only where there are
    kernels for it: the reference runs them one by one."""
    return replace(case, suite=(), documents_alone=True, widened=True)


def flat_patches(counts: list[tuple[int, int]], count: int, dtype: torch.dtype) -> Batch:
    """SigLIP 2 takes (N, most patches of an image, pixels of a patch), padding 0."""
    shapes = counts[:count]
    most = max(height * width for height, width in shapes)
    mask = torch.stack([torch.arange(most) < height * width for height, width in shapes]).long()
    patches = pixels(count, most, 3 * PATCH**2, dtype=dtype, seed=count) * mask[..., None]
    return {"pixel_values": patches, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}


def joined_patches(counts: list[tuple[int, int]], count: int, dtype: torch.dtype) -> Batch:
    """MiniCPM-V takes the patches of all images side by side."""
    shapes = counts[:count]
    patches = sum(height * width for height, width in shapes)
    return {"pixel_values": pixels(1, 3, PATCH, patches * PATCH, dtype=dtype), "target_sizes": torch.tensor(shapes)}


def small_vlm_cases(conv: dict[str, Any], text: dict[str, Any]) -> list[Case]:
    """LFM2-VL, and MiniCPM-V 4.6, whose tower runs on a rank's own images."""
    lfm2 = text_config("Lfm2", **conv).to_dict()
    vision = {"hidden_size": HEADS * 4, "num_attention_heads": HEADS, "intermediate_size": 64, "patch_size": PATCH}
    siglip2 = vision | {"model_type": "siglip2_vision_model", "num_hidden_layers": 2, "num_patches": GRID**2}
    siglip2["vision_use_head"] = False
    flat = [(6, 4), (4, 4), (2, 6), (4, 8), (6, 6)]
    flats = {"image": Visuals([[height * width // 4] for height, width in flat], partial(flat_patches, flat))}
    minicpm = vision | {"num_hidden_layers": 3, "image_size": GRID * PATCH, "insert_layer_id": 1}
    joined = [(8, 8), (4, 8), (4, 4), (8, 4), (12, 4)]
    joint = {"image": Visuals([[height * width // 16] for height, width in joined], partial(joined_patches, joined))}
    ids = {"video_token_id": VIDEO, "image_size": GRID * PATCH, "insert_layer_id": 1}
    return [
        hybrid(vlm_case("lfm2_vl", "Lfm2Vl", (siglip2, lfm2, flats), projector_hidden_size=40)),
        hybrid(vlm_case("minicpmv4_6", "MiniCPMV4_6", (minicpm, text, joint), **ids)),
    ]


def hybrid_cases() -> list[Case]:
    """In `tests/wrappers/test_hybrids.py`, each on a few ranks."""
    small = {"kv_heads": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 24}
    delta = MIXED | DELTA | small
    mrope = delta | {ROPE: MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}}
    moe = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24}
    mamba = MAMBA | small | {"layers": 3, "mamba_d_head": "auto", "mamba_expand": 3}
    nemotron = small | {"layer_types": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]}
    nemotron |= {"mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 16}
    nemotron |= EXPERTS | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24}
    kimi = MIXED | small | {"linear_num_heads": 3, "linear_head_dim": 8, "mlp_layer_types": ["dense"] * 3}
    kimi |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4, "kv_heads": 4}
    granite = mamba | EXPERTS | {"num_local_experts": 4, "shared_intermediate_size": 24} | MIXED
    vision = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH, "depth": 2}
    vision |= {"intermediate_size": 80, "out_hidden_size": 32, "num_position_embeddings": 64}
    ids = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    conv = small | {"layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    lara = moe | delta | {"layer_types": ["linear_attention", "full_attention", "sliding_attention"]}
    text = text_config("Qwen3_5Text", **mrope).to_dict()
    text_moe = text_config("Qwen3_5MoeText", **mrope, **moe).to_dict()
    visuals = qwen_visuals(frame_spans=True)
    return [
        hybrid(text_case("qwen3_5", "Qwen3_5", **mrope)),
        hybrid(text_case("qwen3_5_moe", "Qwen3_5Moe", **mrope, **moe)),
        hybrid(text_case("qwen3_next", "Qwen3Next", **delta, **moe)),
        hybrid(text_case("olmo_hybrid", "OlmoHybrid", **delta)),
        hybrid(text_case("kimi_linear", "KimiLinear", **kimi)),
        hybrid(text_case("lara_mini", "LaraMini", sliding_window=7, **lara)),
        hybrid(text_case("bailing_hybrid", "BailingHybrid", num_local_experts=4, **kimi)),
        hybrid(text_case("lfm2", "Lfm2", **conv)),
        hybrid(text_case("lfm2_moe", "Lfm2Moe", num_dense_layers=1, num_experts=4, **EXPERTS, **conv)),
        hybrid(text_case("nemotron_h", "NemotronH", **nemotron)),
        hybrid(text_case("bamba", "Bamba", attn_layer_indices=[1], **mamba)),
        hybrid(text_case("falcon_h1", "FalconH1", mamba_d_ssm=96, **mamba)),
        # Its masks are made without position_ids: nothing keeps documents apart, in one process or on ranks.
        replace(hybrid(text_case("granite_hybrid", "GraniteMoeHybrid", **granite)), documents_alone=False),
        hybrid(vlm_case("qwen3_5_vl", "Qwen3_5", (vision, text, visuals), **ids)),
        hybrid(
            vlm_case("qwen3_5_moe_vl", "Qwen3_5Moe", (vision, text_moe, visuals), experts_implementation="eager", **ids)
        ),
        *small_vlm_cases(conv, text),
    ]


def is_installed(case: Case) -> bool:
    """Whether the installed version of transformers has a case's model."""
    model, config, *_ = case.build.args if isinstance(case.build, partial) else ("", None)
    return not isinstance(config, Missing) and hasattr(transformers, model)


CASES = {
    case.name: case
    for case in (
        *hybrid_cases(),
        *qwen_cases(),
        *llava_cases(),
        *gemma_cases(),
        *padded_cases(),
        *packed_cases(),
        *vision_cases(),
        *text_cases(),
        *odd_head_cases(),
    )
    if is_installed(case)
}

CASES |= {case.name: case for case in special.cases() if is_installed(case)}
