"""What the shrinker cannot guess about models that take images, by model_type: see entries.py."""

from __future__ import annotations

from typing import Any

from zoo.shrink import HEAD_DIM, HEADS, LAYERS, PATCH, SIDE, WIDER, WIDTH

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
_GEMMA4_VISION = {
    "hidden_size": WIDTH, "head_dim": HEAD_DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "intermediate_size": WIDER, "num_hidden_layers": LAYERS, "patch_size": PATCH, "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}  # fmt: skip
_MUSE_VISION = {
    "vision_config.num_hidden_layers": 4,
    "vision_config.layer_types": ["window_attention"] * 3 + ["full_attention"],
}

# Sliding layers have heads of their own.
_SLIDING = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16}
_SLIDING |= {"head_dim": HEAD_DIM, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DOTS3_NOTE = {
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"], "per_layer_config": {2: _SLIDING},
    "rope_parameters": None, "index_head_dim": 16, "index_n_heads": 2, "shared_experts_intermediate_size": WIDER,
}  # fmt: skip

VLM_ENTRIES: dict[str, dict[str, Any]] = {
    "blip-2": {"num_query_tokens": 4},
    "chameleon": {
        "vocabulary_map": {f"IMGIMG{chr(65 + i)}Z": 110 + i for i in range(10)} | {"<image>": 3},
        "vq_config.num_embeddings": 10, "vq_config.base_channels": 32, "vq_config.resolution": SIDE,
        "vq_config.latent_channels": 32, "vq_config.num_res_blocks": 1, "vq_config.channel_multiplier": [1, 1, 2],
    },
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE},
        "text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "vision_config.deepstack_visual_indexes": [0, 1],
    },
    "apertus1p5": {
        "image_token_offset": 110, "audio_token_offset": 126, "vision_config.codebook_size": 16,
        "audio_config.codebook_size": 16, "audio_config.codebook_dim": WIDTH,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "vision_config.sam_config.downsample_channels": [WIDER, WIDTH],
    },
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in DOTS3_NOTE.items()},
        "vision_config.adapter_in_dim": WIDTH, "vision_config.adapter_out_dim": WIDTH,
        "audio_config.adapter_input_size": WIDTH, "audio_config.adapter_out_dim": WIDTH,
    },
    "emu3": {
        "vocabulary_map": {f"<|visual token {i:06d}|>": 110 + i for i in range(16)}
        | {"<image>": 3, "<|extra_200|>": 109},
        "vq_config.base_channels": 32, "vq_config.codebook_size": 16, "vq_config.channel_multiplier": [1, 2],
        "vq_config.hidden_size": 64,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": _MROPE, "text_config.moe_intermediate_size": [WIDER, 16],
        "text_config.num_key_value_heads": HEADS,
    },
    "evolla": {"resampler_depth": 2},
    "gemma4": {"vision_config": _GEMMA4_VISION, "text_config.hidden_size_per_layer_input": 8},
    "gemma4_unified": {
        "vision_config": {
            "patch_size": PATCH, "pooling_kernel_size": 2, "mm_embed_dim": WIDTH, "mm_posemb_size": 16,
            "output_proj_dims": WIDTH,
        },
    },
    "git": {"num_image_with_embedding": None},
    "granite4_vision": {
        "spatial_target_layers": [0, 1], "downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [1, 1]],
        "vision_config.hidden_size": 64,
    },
    "granite_docling": {"vision_config.deepstack_visual_indexes": [0, 1], "vision_config.scale_factor": 2},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM, "text_config.rope_parameters": _MROPE,
                   "vision_config.num_key_value_heads": HEADS},
    "hy_v4_vl": {
        "text_config.qk_rope_head_dim": 12, "text_config.rope_parameters": _MROPE, "text_config.head_dim": 12,
        "text_config.qk_head_dim": 20, "text_config.index_head_dim": 16, "text_config.index_n_heads": 2,
    },
    "instructblip": {"num_query_tokens": 4},
    "instructblipvideo": {"num_query_tokens": 4},
    "kimi_k25": {"projection_hidden_size": WIDTH, "vision_config.pos_emb_height": 8, "vision_config.pos_emb_width": 8},
    "kosmos-2": {"latent_query_num": 4, "text_config.layers": LAYERS},
    "kosmos-2.5": {
        "latent_query_num": 4, "text_config.layers": LAYERS,
        "vision_config.patch_embed_hidden_size": 3 * PATCH**2,
    },
    "llama4": {
        "vision_config.intermediate_size": 4 * WIDTH, "vision_config.vision_output_dim": WIDTH,
        "vision_config.projector_input_dim": WIDTH, "vision_config.projector_output_dim": WIDTH,
        "text_config.floor_scale": 5, "text_config.attn_scale": 0.7,
    },
    # The merger runs behind a layer that there is; without it images would be read at each other's rows.
    **{name: {"insert_layer_id": 1} for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "mllama": {
        "vision_config.num_global_layers": 1, "vision_config.vision_output_dim": 2 * WIDTH,
        "vision_config.max_num_tiles": 2, "vision_config.intermediate_layers_indices": [0],
        "vision_config.supported_aspect_ratios": [[1, 1], [1, 2]], "text_config.cross_attention_layers": [1],
    },
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 2], "adapter_config.num_key_value_heads": HEADS,
        "vision_config.num_key_value_heads": HEADS, "vision_config.num_position_embeddings": (SIDE // PATCH) ** 2,
        "text_config.additional_vocab_size": 4, "image_patch_id": 3,
    },
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH, "text_config.moe_hidden_size": WIDTH},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen4_exp": {
        "text_config.linear_key_head_dim": 8, "text_config.linear_value_head_dim": 8,
        "text_config.linear_num_key_heads": 2, "text_config.linear_num_value_heads": 4, "text_config.hc_lowrank": 8,
        "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 12,
        "text_config.indexer_budget": 512, "text_config.indexer_compress_ratio": 2,
    },
    "vipllava": {"vision_feature_layers": [-2, 1]},
    "step3p7": {
        "text_config.sliding_window": 7, "text_config.num_sliding_attention_heads": 8,
        "text_config.share_expert_dim": WIDER,
        "text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
}  # fmt: skip
VISION_ENTRIES: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"pos_embed_rescale": None},
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 2},
    "vivit": {"num_frames": 2, "tubelet_size": [2, PATCH, PATCH]},
}
