"""What the shrinker cannot guess, by model_type: fields that replace its own, those of parts behind a dot."""

from __future__ import annotations

from typing import Any

from zoo.vlm_entries import VISION_ENTRIES, VLM_ENTRIES

# Those whose configuration says whether they are causal; by default they are not.
DECODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 12, "budget": 8, "compress_ratio": 4}
_SHARED = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}  # attention in turns
_SHARED |= {"attention_hidden_size": 96, "attention_head_dim": 24}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 16}

ENTRIES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1], "mamba_expand": 2},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"mamba_expand": 2, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": 12},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": 12},
    "ministral": {"rope_parameters": _ROPE, "head_dim": 12},
    "nemotron": {"head_dim": 12, "num_key_value_heads": 2},
}
# Decoders only, and no part of another size than the shrinker's.
ENTRIES |= {name: {"is_decoder": True} for name in DECODERS}
ENTRIES |= {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config.hidden_size": 48},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 96, "ssm_multipliers": [1.0] * 5},
    "gemma3n_text": {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    | {"intermediate_size": [40] * 3, "activation_sparsity_pattern": [0.5, 0.0, 0.0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "marian": {"decoder_vocab_size": 160},
    "mamba2": {"num_heads": 8, "head_dim": 12, "n_groups": 2, "state_size": 5, "chunk_size": 16},
    "qwen4_exp": {f"text_config.indexer_{name}": value for name, value in _INDEXER.items()},
    "stablelm": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}},
    "xlstm": {"embedding_dim": 48},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": _SHARED,
    "zamba2": _SHARED
    | {"hybrid_layer_ids": [1, 3], "mamba_headdim": 12, "mamba_ngroups": 2}
    | {"n_mamba_heads": 8, "mamba_d_state": 5, "chunk_size": 16},
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
    "hunyuan_vl": {"text_config.rope_parameters": _ROPE},
    "internvl": {"image_seq_length": 9},
}
ENTRIES |= VLM_ENTRIES | VISION_ENTRIES | {"t5gemma2": {"encoder.mm_tokens_per_image": 9}}
# Those that compute in float32, whatever their weights are in, or make masks of more than it holds.
FLOAT32 = {"inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "kosmos-2"}
# The classes whose configuration is that of a part.
TEXT_CONFIGS = {"dots3_note", "emu3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "musicgen", "musicgen_melody"}
