"""Tiny configurations of any model of transformers, made from the default ones: sizes go by their names."""

from __future__ import annotations

import re
from typing import Any

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, WIDER = 3, 48, 4, 2, 12, 40
VOCAB, POSITIONS, EXPERTS, ACTIVE, PATCH, SIDE = 160, 256, 4, 2, 4, 24

# Names of sizes, and what they become at most.
_SIZES: list[tuple[str, int]] = [
    (r"num_attention_heads|num_heads|n_heads?|num_query_heads|(en|de)coder_attention_heads|attention_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads", KV_HEADS),
    (r"head_dim|head_size|d_kv|d_head|kv_channels|attention_head_dim|global_head_dim", HEAD_DIM),
    (r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers|num_blocks|vision_layers", LAYERS),
    (r"(out_|vision_|text_|encoder_|projector_|backbone_|adapter_)?hidden_size|d_model|n_embd|embed_dim", WIDTH),
    (r"(vision_)?embed_dim|embedding_size|dim|model_dim|width|word_embed_proj_dim|(text_)?projection_dim", WIDTH),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|.*ffn_hidden_size|mlp_dim|intermediate_dim", WIDER),
    (r"(text_)?vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"(original_)?max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?|n_ctx|seq_length", POSITIONS),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_per_layer", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|experts_top_k", ACTIVE),
    (r"n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(vision_)?patch_size", PATCH),
    (r"image_size|img_size|input_size", SIDE),
    (r"(q_|kv_|o_)?lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"qk_rope_head_dim", 4),
    (r"window_size", 16),
    (r"sliding_window|attention_window|local_window_size", 7),
    (r"attention_chunk_size", 16),
    (r"num_position_embeddings", 64),
    (r"rotary_dim|linear_(key_|value_)?head_dim", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_(value_)?heads", 4),
    (r"temporal_patch_size|spatial_merge_size", 2),
]
_PATTERNS = [(re.compile(pattern), size) for pattern, size in _SIZES]
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 3, "video_token_id": 4}
_IDS |= {"audio_token_id": 5, "image_token_index": 3, "video_token_index": 4, "sep_token_id": 2}
_LEFT_OUT = {"out_features", "out_indices", "stage_names", "_out_features", "_out_indices"}  # they follow from others
FIRST_TEXT = 40  # ids from here on are text


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's fields, those of its parts too, with small sizes and small ids."""
    small = {name: _shrunk(name, value, list(values)) for name, value in values.items() if name not in _LEFT_OUT}
    if small.get("kv_lora_rank"):  # latent attention: keys have as many heads as queries
        small |= {"num_key_value_heads": small.get("num_attention_heads"), "head_dim": small.get("qk_rope_head_dim")}
        if "qk_head_dim" in small:
            small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    layers = next((small[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if small.get(name)), None)
    for name, value in small.items():
        if isinstance(value, list) and isinstance(layers, int) and len(value) > layers and name != "architectures":
            small[name] = _spread(value, layers)
    return small


def _shrunk(name: str, value: Any, names: list[str]) -> Any:
    if name == "per_layer_config":
        return {int(layer): fields for layer, fields in (value or {}).items() if int(layer) < LAYERS} or None
    if value is None and re.fullmatch("num_experts_per_tok(en)?", name):
        return ACTIVE
    if isinstance(value, dict):
        part = name.endswith("config") or "model_type" in value
        return _rope(value) if name.startswith("rope_") else shrink(value) if part else value
    if name in _IDS:
        return _IDS[name]
    if isinstance(value, float) and re.search("drop|jitter", name):  # what is drawn at random has no one answer
        return 0.0
    if isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
        return 6 + names.index(name) % 30
    if name in ("image_size", "patch_size") and isinstance(value, list):
        return [SIDE if name == "image_size" else PATCH] * len(value)
    if name == "fullatt_block_indexes":
        return [1]
    if name == "image_grid_pinpoints":
        return [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)
    return value if size is None or value <= 0 else min(value, size)


def _spread(values: list[Any], count: int) -> list[Any]:
    """`count` of these values, every kind among them if there are not too many."""
    kinds = list(dict.fromkeys(map(str, values)))
    chosen = [next(value for value in values if str(value) == kind) for kind in kinds][:count]
    return chosen + [values[0]] * (count - len(chosen))


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotations along three axes, of 6 pairs of channels; the default kind where there is none."""
    if "rope_type" in values and None in (values["rope_type"], values.get("rope_theta", 1)):
        return {"rope_type": "default", "rope_theta": 10000.0}
    sections = {"mrope_section": [2, 2, 2]} if isinstance(values.get("mrope_section"), list) else {}
    return {name: _rope(value) if isinstance(value, dict) else value for name, value in values.items()} | sections
