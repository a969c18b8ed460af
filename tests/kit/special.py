"""Cases whose attention, positions or tokens are special, for `tests/wrappers/test_special.py`. zoo.py imports this
file in its last lines; it is made of what stands there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kit import zoo
from kit.zoo import EXPERTS, HEADS, PAD, VISION_END, VISION_START, VOCAB, WIDTH, Case, text_case

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
    built = getattr(zoo.hf, config)(**(common | options))
    return replace(case, build=zoo.partial(zoo.build, model, built, "sdpa"))


def llama4_cases() -> list[Case]:
    """Chunks; layers without rotary positions, whose temperature goes by a token's number in its row."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    options = experts | {"attention_chunk_size": 7, "floor_scale": 5, "attn_scale": 0.7, "intermediate_size_mlp": 80}
    options |= {"no_rope_layers": [1, 0, 1], "layers": 3, "num_attention_heads": 10, "kv_heads": 5}
    return [special(text_case("llama4_text", "Llama4", head_dim=8, **options))]


def cases() -> list[Case]:
    return [*deepseek_cases(), *position_cases(), *llama4_cases()]
