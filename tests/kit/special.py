"""Cases whose attention, positions or tokens are special, for `tests/wrappers/test_special.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kit import tiny
from kit.tiny import (
    EXPERTS,
    GRID,
    HEADS,
    IMAGE,
    PAD,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    WIDTH,
    Case,
    Visuals,
    text_case,
    text_config,
    vlm_case,
)

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 8}


def special(case: Case) -> Case:
    """Not in the suite of all families: these have a file of their own. What is done in float32 is done in float64."""
    return replace(case, suite=(), widened=True)


def deepseek_cases() -> list[Case]:
    """Multi-head latent attention: values of fewer channels than keys."""
    experts = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
    options = LATENT | experts | {"first_k_dense_replace": 1, "head_dim": 4}
    five = {"num_attention_heads": 5, "kv_heads": 5, "hidden_size": 40}
    return [
        special(text_case("deepseek_v3", "DeepseekV3", **options)),
        special(text_case("deepseek_v3_5", "DeepseekV3", **options, **five)),
        special(text_case("deepseek_v2", "DeepseekV2", topk_method="group_limited_greedy", **options)),
    ]


def position_cases() -> list[Case]:
    """Learned positions: by a token's number in its row (GPT-2), or among the tokens that the mask keeps (OPT)."""
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    opt = {"ffn_dim": 80, "dropout": 0.0, "attention_dropout": 0.0, "word_embed_proj_dim": 20, "kv_heads": HEADS}
    gpt2 = special(learned("gpt2", "GPT2LMHeadModel", "GPT2Config", scale_attn_by_inverse_layer_idx=True, **dropout))
    five = learned("opt", "OPTForCausalLM", "OPTConfig", **opt | {"num_attention_heads": 5, "hidden_size": 40})
    return [gpt2, special(five)]


def learned(name: str, model: str, config: str, **options: Any) -> Case:
    """A text case of a model that has no class FamilyForCausalLM, or no key/value heads of its own."""
    common = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": VISION_START, "eos_token_id": VISION_END,
        "use_cache": False,
    }  # fmt: skip
    case = text_case(name, "Llama")
    built = getattr(tiny.hf, config)(**(common | options))
    return replace(case, build=partial(tiny.build, model, built, "sdpa"))


def llama4_cases() -> list[Case]:
    """Chunks; layers without rotary positions, whose temperature goes by a token's number in its row; rotations of a
    tower that are given once for all images."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    options = experts | {"attention_chunk_size": 7, "floor_scale": 5, "attn_scale": 0.7, "intermediate_size_mlp": 80}
    options |= {"no_rope_layers": [1, 0, 1], "layers": 3, "num_attention_heads": 10, "kv_heads": 5}
    vision = {"projector_input_dim": 20, "projector_output_dim": 20, "vision_output_dim": 20, "intermediate_size": 192}
    tower = tiny.vision_config("Llama4Vision", **vision)
    parts = (tower, text_config("Llama4Text", **options), tiny.tile_visuals([2, 1, 1, 1, 1], GRID**2 // 4))
    # transformers 5.24 reads a field that the output of its own decoder doesn't have.
    modeling: Any = tiny.transformers.models.llama4.modeling_llama4
    if hasattr(modeling, "MoeCausalLMOutputWithPast"):
        modeling.MoeCausalLMOutputWithPast.image_outputs = None
    return [
        special(text_case("llama4_text", "Llama4", **options)),
        special(vlm_case("llama4", "Llama4", parts)),
    ]


def kimi_visuals() -> dict[str, Visuals]:
    """Frames of a clip are averaged after the last block."""
    grids = [(1, 10, 14), (2, 4, 6), (1, 4, 12), (3, 2, 2), (1, 2, 10)]

    def inputs(count: int, dtype: torch.dtype) -> tiny.Batch:
        grid = torch.tensor(grids[:count])
        return {
            "pixel_values": tiny.pixels(int(grid.prod(-1).sum()), 3, PATCH, PATCH, dtype=dtype, seed=count),
            "image_grid_thw": grid,
        }

    return {"image": Visuals([[height * width // 4] for _, height, width in grids], inputs)}


def kimi_cases() -> list[Case]:
    """A tower whose class doesn't say that it takes pixels, before latent attention."""
    vision = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 24}
    vision |= {"patch_size": PATCH, "pos_emb_height": 8, "pos_emb_width": 8}
    text = text_config("DeepseekV3", **LATENT, head_dim=4, first_k_dense_replace=2)
    ids = {"video_token_id": VIDEO, "projection_hidden_size": WIDTH}
    parts = (tiny.hf.Kimi_K25VisionConfig(**vision), text, kimi_visuals())
    return [special(vlm_case("kimi_k25", "Kimi_K25", parts, **ids))]


def mllama_batch(name: str, dtype: torch.dtype) -> tiny.Batch:
    """Images of up to two tiles, which a row sees from their place in it on."""
    batch = tiny.vlm_batch(name, {"image": Visuals([[1]] * 5, lambda count, dtype: {})}, False, dtype)
    rows = len(batch["input_ids"])
    seen = (batch["input_ids"] == IMAGE).cumsum(1)
    images = int(seen.max())
    if not images:
        return batch
    side = GRID * PATCH
    tiles = (1 + (torch.arange(rows * images) % 2)).view(rows, images)  # the aspect ratios 1 x 1 and 1 x 2
    there = torch.arange(2) < tiles[..., None]
    after = seen[..., None, None] > torch.arange(images)[:, None]
    return batch | {
        "pixel_values": tiny.pixels(rows, images, 2, 3, side, side, dtype=dtype),
        "aspect_ratio_ids": tiles,
        "aspect_ratio_mask": there.long(),
        "cross_attention_mask": (after & there[:, None]).long(),
    }


def mllama_cases() -> list[Case]:
    """Layers that attend to the states of images."""
    text = text_config("MllamaText", layers=3, kv_heads=5, num_attention_heads=10, hidden_size=80,
                       cross_attention_layers=[1])  # fmt: skip
    vision = tiny.vision_config("MllamaVision", num_global_layers=1, max_num_tiles=2, vision_output_dim=HEADS * 8,
                               intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2]])  # fmt: skip
    case = vlm_case("mllama", "Mllama", (vision, text, {}), attention="sdpa")
    names = [name for name in tiny.LAYOUTS if "video" not in name]
    return [special(replace(case, batches={name: partial(mllama_batch, name) for name in names}))]


def ernie_cases() -> list[Case]:
    """Experts by the type of a token."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = text_config("Ernie4_5_VLMoeText", kv_heads=4, moe_intermediate_size=[24, 16], moe_k=2, moe_num_experts=4,
                       moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse"], rope_parameters=rope,
                       experts_implementation="eager")  # fmt: skip
    vision = {"depth": 2, "hidden_size": WIDTH, "num_heads": HEADS, "patch_size": PATCH, "intermediate_size": 80}
    ids = {"video_token_id": VIDEO, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
    visuals = {"image": tiny.qwen_visuals()["image"]}
    case = vlm_case("ernie4_5_vl_moe", "Ernie4_5_VLMoe", (vision, text, visuals), experts_implementation="eager", **ids)
    batches = {name: partial(by_type, name, visuals) for name in case.batches}
    # It makes zeros in float32 for the scores of its experts.
    return [replace(case, batches=batches, suite=(), dtype=torch.float32)]


def by_type(name: str, visuals: dict[str, Visuals], dtype: torch.dtype) -> tiny.Batch:
    """The types of tokens for positions, and for experts, where start and end of an image count as image."""
    batch = tiny.vlm_batch(name, visuals, True, dtype)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"][:, : 3 * PATCH**2]
    return batch | {"moe_mm_token_type_ids": ((batch["input_ids"] >= 1) & (batch["input_ids"] <= VISION_END)).int()}


def molmo2_visuals() -> dict[str, Visuals]:
    """A picture of one crop, whose patches are pooled by fours."""

    def inputs(count: int, dtype: torch.dtype) -> tiny.Batch:
        corners = (torch.arange(0, GRID, 2)[:, None] * GRID + torch.arange(0, GRID, 2)).flatten()
        pooling = corners[:, None] + torch.tensor([0, 1, GRID, GRID + 1])
        images = torch.arange(count) * GRID**2
        return {
            "pixel_values": tiny.pixels(count, GRID**2, 3 * PATCH**2, dtype=dtype, seed=count),
            "image_token_pooling": (images[:, None, None] + pooling).flatten(0, 1),
            "image_grids": torch.tensor([[3, 3, 0, 0]] * count),
        }

    return {"image": Visuals([[9]] * 5, inputs)}


def molmo2_cases() -> list[Case]:
    """Image tokens that all see one another, in rows of one image."""
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 4, "hidden_size": HEADS * 4}
    vision = tiny.hf.Molmo2VisionConfig(
        **heads, intermediate_size=24, num_hidden_layers=2, patch_size=PATCH, num_position_embeddings=GRID**2,
        image_size=[GRID * PATCH] * 2,
    )  # fmt: skip
    adapter = tiny.hf.Molmo2AdapterConfig(
        **heads, vision_feature_layer=[0, 1], intermediate_size=24, text_hidden_size=WIDTH
    )
    text = text_config("Molmo2Text", kv_heads=4, additional_vocab_size=4)
    case = vlm_case("molmo2", "Molmo2", (vision, text, molmo2_visuals()), adapter_config=adapter)
    batches = {name: partial(typed, batch) for name, batch in case.batches.items() if name in ("plain", "no_images")}
    return [special(replace(case, batches=batches))]


GEMMA4_GRIDS = [(6, 4), (4, 4), (2, 6), (4, 6), (2, 2)]  # patches of pictures, padded to 28; pooled by 2 x 2


def gemma4_visuals() -> dict[str, Visuals]:
    def inputs(count: int, dtype: torch.dtype) -> tiny.Batch:
        positions = torch.full((count, 28, 2), -1)
        for row, (height, width) in zip(positions, GEMMA4_GRIDS, strict=False):
            columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
            row[: height * width] = torch.stack([columns.flatten(), rows.flatten()], -1)
        values = tiny.pixels(count, 28, 3 * PATCH**2, dtype=dtype, seed=count)
        return {"pixel_values": values, "image_position_ids": positions}

    return {"image": Visuals([[height * width // 4] for height, width in GEMMA4_GRIDS], inputs)}


def typed(recipe: Any, dtype: torch.dtype) -> tiny.Batch:
    """With the types of tokens that say where images are."""
    batch = recipe(dtype)
    return batch | {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


def gemma4_cases() -> list[Case]:
    """Inputs by layer, keys and values that later layers take from earlier ones, head dims by layer, spans of images in
    layers with windows only."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text = {"layer_types": kinds, "layers": 5, "num_kv_shared_layers": 2, "sliding_window": 7, "global_head_dim": 16}
    text |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "kv_heads": 2, "hidden_size": 40}
    text |= {"num_attention_heads": 10, "final_logit_softcapping": 3.0, "intermediate_size": 24}
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    alike = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "experts_implementation": "eager"}
    vision = {"hidden_size": HEADS * 4, "head_dim": 4, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    vision |= {"intermediate_size": 24, "num_hidden_layers": 2, "patch_size": PATCH, "pooling_kernel_size": 2}
    vision = tiny.hf.Gemma4VisionConfig(position_embedding_size=16, **vision)
    seeing = text_config("Gemma4Text", use_bidirectional_attention="vision", **text)
    ids = {"video_token_id": VIDEO, "audio_token_id": 1000, "audio_config": None}
    vlm = vlm_case("gemma4", "Gemma4", (vision, seeing, gemma4_visuals()), **ids)
    blind = vlm_case("gemma4_causal", "Gemma4", (vision, text_config("Gemma4Text", **text), gemma4_visuals()), **ids)
    return [
        special(text_case("gemma4_text", "Gemma4", **text)),
        special(text_case("gemma4_moe", "Gemma4", **text | experts | alike)),
        *(
            special(replace(case, batches={name: partial(typed, batch) for name, batch in case.batches.items()}))
            for case in (vlm, blind)
        ),
    ]


def sink_cases() -> list[Case]:
    """A learned sink for each head. Transformers' eager attention is the one that has them in float64."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    options = experts | {"num_attention_heads": 10, "kv_heads": 5, "hidden_size": 40, "intermediate_size": 24}
    options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "rope_parameters": rope}
    config, eager = text_config("GptOss", **options), "eager"
    tower = tiny.vision_config("InternVLVision", attention_bias=True)
    parts = (tower, config, tiny.tile_visuals([2, 1, 1, 1, 1], GRID**2 // 4))
    internvl = vlm_case("internvl_gpt_oss", "InternVL", parts, attention=eager, experts_implementation=eager)
    text = text_case("gpt_oss", "Llama")
    return [special(replace(text, build=partial(tiny.build, "GptOssForCausalLM", config, eager))), special(internvl)]


def cases() -> list[Case]:
    return [
        *deepseek_cases(),
        *position_cases(),
        *llama4_cases(),
        *gemma4_cases(),
        *kimi_cases(),
        *mllama_cases(),
        *ernie_cases(),
        *molmo2_cases(),
        *sink_cases(),
    ]
