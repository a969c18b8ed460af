"""What the shrinker cannot guess, by model_type: fields that replace its own, those of parts behind a dot."""

from __future__ import annotations

from typing import Any

from zoo.vlm_entries import VLM_ENTRIES

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 16}

ENTRIES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1], "mamba_expand": 2},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 96},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"mamba_expand": 2, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 12},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 12},
    "ministral": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "nemotron": {"head_dim": 12},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
_MARKS = {"vision_start_token_id": 6, "vision_end_token_id": 7}
_HALF = _MROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
ENTRIES |= {name: {"text_config.rope_parameters": _MROPE} for name in ("glm4v", "glm46v", "glm_ocr", "qwen2_5_vl")}
ENTRIES |= {
    "aria": {"projector_patch_to_query_dict": {36: 9}},
    "glm4v_moe": {"text_config.rope_parameters": _HALF},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
        "text_config.rope_parameters": _MROPE,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 6, "vision_end_token_id": 7},
    "gemma3": {"mm_tokens_per_image": 9},
    "hunyuan_vl": {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "internvl": {"image_seq_length": 9},
}
ENTRIES |= VLM_ENTRIES
# The classes whose configuration is that of a part.
TEXT_CONFIGS = {"emu3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "musicgen", "musicgen_melody"}
