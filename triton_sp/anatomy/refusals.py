"""Whether the blocks of a stack compute the same on a shard: whatever is not known to is refused, by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from triton_sp.anatomy.families import numbers_its_tokens
from triton_sp.anatomy.parts import (
    Anatomy,
    Stack,
    attention_like,
    calls_attention_interface,
    own_code_names,
    takes_positions,
)
from triton_sp.errors import UnsupportedModelError

DECODER_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_RECURRENT_TYPES, _TOKEN_WISE_TYPES = {"linear_attention", "conv", "hybrid"}, {"mlp", "moe"}
_TOKEN_WISE = (
    "Norm",
    "Activation",
    "Dropout",
    "DropPath",
    "LayerScale",
    "Experts",
    "MoeStatics",
    "Router",
    "Identity",
    "GELU",
    "Gelu",
    "Softcap",
    "SiLU",
)
_BLOCK_PARAMETERS = {
    "hidden_states", "attention_mask", "cu_seqlens", "max_seqlen", "position_embeddings", "rotary_pos_emb",
    "position_ids", "past_key_values", "past_key_value", "cache", "use_cache", "cache_position", "output_attentions",
    "head_mask", "layer_head_mask", "causal_attention_mask", "layer_past", "mamba_attention_mask",
    "per_layer_input", "shared_kv_states",  # of Gemma 4: cut by token where it is made; what an earlier layer has made
    "cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask",  # of Mllama
    "moe_mm_token_type_ids",  # of ERNIE 4.5 VL, cut by token
    "freqs_ci",  # of Llama 4's tower, a row for each token of an image
    "encoder_hidden_states", "encoder_attention_mask",  # None in a decoder that reads no other sequence
    "kwargs",
}  # fmt: skip


# What an attention module could number, add up or shift its tokens by: on a shard, its own ones.
_ALONG_TOKENS = {"arange", "linspace", "cumsum", "cumprod", "roll", "flip", "conv1d", "unfold"}


def refuse_blocks(stack: Stack, names: dict[int, str]) -> UnsupportedModelError | None:
    """The first reason why the blocks of a stack would not compute the same on a shard, or None."""
    block = stack.blocks[0]
    taken = {name for kind in map(type, stack.blocks) for name in inspect.signature(kind.forward).parameters}
    unknown = taken - _BLOCK_PARAMETERS - {"self", "x", "hidden_state"}
    if stack.by_interface and unknown:
        return UnsupportedModelError(
            names[id(block)],
            expected=f"a block that takes {sorted(_BLOCK_PARAMETERS - {'kwargs'})}",
            found=f"parameters {sorted(unknown)}, each of which may have an entry for every token",
            remedy="add them to triton_sp/anatomy/refusals.py once they are known to be right on a shard",
        )
    if not stack.by_interface:  # proven by a trial on the first call instead, see wrappers/plain/trial.py
        return next((_refuse_stage(block, names) for block in stack.blocks if not _attends(block)), None)
    modules = [module for block in stack.blocks for module in block.modules()]
    known = _convolutions(stack.recurrent)
    refusals = (_refuse_layer(module, names) for module in modules if id(module) not in known)
    return next(filter(None, refusals), None)


def _convolutions(layers: Iterable[nn.Module]) -> set[int]:
    """The ids of the convolutions of recurrent layers, which get a halo."""
    return {id(child) for layer in layers for child in layer.children() if isinstance(child, nn.Conv1d)}


def _attends(block: nn.Module) -> bool:
    return any(map(attention_like, block.modules()))


def _refuse_stage(block: nn.Module, names: dict[int, str]) -> UnsupportedModelError:
    """Stages of convolutions in one list with those of attention (MobileViT) change how many tokens there are."""
    return UnsupportedModelError(
        names[id(block)],
        expected="a list of blocks that all attend",
        found=f"{type(block).__name__}, which holds no attention",
        remedy="use a tower of one kind of blocks",
    )


def _refuse_layer(module: nn.Module, names: dict[int, str]) -> UnsupportedModelError | None:
    name = names.get(id(module), type(module).__name__)
    own = [name for name, _ in module.named_parameters(recurse=False)]
    leaf = not any(True for _ in module.children())
    if getattr(module, "drop_prob", 0):
        return refuse_stochastic_depth(name, module)
    # Sinks it hands on, see wrappers/layers/attention.py.
    if calls_attention_interface(module) and set(own) - {"sinks"}:
        return UnsupportedModelError(
            name,
            expected="attention whose parameters all lie in layers that work token by token",
            found=f"parameters {own} of its own",
            remedy="use a model without them; learned biases are not handled yet",
        )
    along = _counts_along(module) if calls_attention_interface(module) else []
    if along and not (along == ["arange"] and numbers_its_tokens(module)):
        return UnsupportedModelError(
            name,
            expected="attention that gets the positions of its tokens, and does not number them itself",
            found=f"{type(module).__name__}, whose code uses {', '.join(along)}",
            remedy="use a model without it: on a shard it would begin to count at the shard's first token",
        )
    if leaf and not is_token_wise(module) and not calls_attention_interface(module):
        return UnsupportedModelError(
            name,
            expected="blocks of attention and of layers that work token by token",
            found=type(module).__name__,
            remedy="add the layer to triton_sp/anatomy/refusals.py if each of its outputs depends on one token alone",
        )
    return None


def _counts_along(attention: nn.Module) -> list[str]:
    """What an attention module would count its own tokens by: functions, or, with transformers 4.57, the cache
    positions by which Llama 4 scales queries, which a decoder numbers from its first token."""
    used = own_code_names(attention)
    by_cache = "floor" in used and "cache_position" in inspect.signature(type(attention).forward).parameters
    return sorted(used & _ALONG_TOKENS) + ["cache_position"] * by_cache


def refuse_stochastic_depth(name: str, module: Any) -> UnsupportedModelError:
    """Stochastic depth draws which images to drop, and so would drop different ones on each rank."""
    return UnsupportedModelError(
        name,
        expected="blocks without stochastic depth, which drops images and not tokens",
        found=f"drop_prob={module.drop_prob}",
        remedy="set the drop path rate of the configuration to 0",
    )


def is_token_wise(module: nn.Module) -> bool:
    """Whether a module without others in it is known to work token by token."""
    if isinstance(module, (nn.Linear, nn.Identity, nn.ParameterDict, nn.ModuleDict, nn.ModuleList)):
        return True
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return True  # GPT-2's linear layer
    if "position_ids" in inspect.signature(type(module).forward).parameters and not attention_like(module):
        # Rotary embeddings turn each token by its own position, but for those that look at the longest one.
        return getattr(module, "rope_type", "default") not in ("dynamic", "longrope")
    source = type(module).__module__
    if source.startswith(("torch.nn.modules.activation", "transformers.activations")):
        return not attention_like(module)
    return any(word in type(module).__name__ for word in _TOKEN_WISE)


def refuse_decoder(anatomy: Anatomy, stack: Stack, names: dict[int, str]) -> UnsupportedModelError | None:
    """The first reason why a decoder would not compute the same on a shard, or None."""
    kinds = _unknown_kinds(stack)
    if kinds:
        return UnsupportedModelError(
            stack.name,
            expected=f"layers of the types {sorted(DECODER_LAYER_TYPES)}, known recurrent layers, or MLPs",
            found=f"{sorted(kinds)} in config.layer_types",
            remedy="use a model without them, or a version of transformers whose layers are known; see docs/hybrids.md",
        )
    parameters = inspect.signature(type(stack.module).forward).parameters
    missing = {"inputs_embeds", "position_ids", "attention_mask"} - set(parameters)
    learned = stack.learned_positions
    if not stack.attention or (learned is not None and takes_positions(learned)):
        missing -= {"position_ids"}  # recurrences need none; or it numbers its tokens itself, for its table
    rotary = any("rotary" in type(module).__name__.lower() for module in stack.module.modules())
    tables = sum(isinstance(module, nn.Embedding) for module in stack.module.modules())
    # Recurrences tell the order without positions.
    ordered = rotary or stack.learned_positions is not None or (bool(stack.recurrent) and tables <= 1)
    if missing or not ordered:
        return UnsupportedModelError(
            stack.name,
            expected="a decoder whose position_ids enter by rotary embeddings, or by one table of positions",
            found=f"a {type(stack.module).__name__} without {sorted(missing) or 'either'}",
            remedy="use a model with one of them; ALiBi counts local tokens",
        )
    return _refuse_head(anatomy.entry, stack) or refuse_blocks(stack, names)


def _refuse_head(entry: nn.Module, stack: Stack) -> UnsupportedModelError | None:
    head = getattr(entry, "get_output_embeddings", lambda: None)()
    if entry is stack.module or head is not None or not _has_own_head(entry):
        return None
    return UnsupportedModelError(
        type(entry).__name__,
        expected="a model that ends in a language-modelling head, or the model without a head",
        found="a head that picks or pools tokens of the whole sequence",
        remedy="wrap the base model and gather its hidden states (SPConfig(gather_logits=True))",
    )


def refuse_text_attention(stack: Stack) -> UnsupportedModelError:
    """Why a text model is refused whose attention isn't causal, or doesn't go through transformers' interface."""
    if stack.attention:
        return UnsupportedModelError(
            stack.name,
            expected="a decoder with causal attention",
            found=f"{type(stack.attention[0]).__name__} with is_causal=False: the model around it makes its masks",
            remedy="use a causal model, or one whose masks triton_sp/anatomy/families.py knows",
        )
    attention = next(module for module in stack.blocks[0].modules() if attention_like(module))
    return UnsupportedModelError(
        stack.name,
        expected="attention that goes through transformers' attention interface",
        found=f"{type(attention).__name__}, which computes attention itself",
        remedy="this text model cannot be sharded; use one whose attention calls ALL_ATTENTION_FUNCTIONS",
    )


def _unknown_kinds(stack: Stack) -> set[str]:
    """The types of layers of which it is not known what each token depends on."""
    config: Any = stack.module.config
    kinds: Any = getattr(config, "layer_types", None) or ()
    if not stack.recurrent:
        return set(kinds) - DECODER_LAYER_TYPES
    recurrent = {id(layer) for layer in stack.recurrent}
    known = DECODER_LAYER_TYPES | _TOKEN_WISE_TYPES
    return {
        kind
        for kind, block in zip(kinds, stack.blocks, strict=False)
        if kind not in known | (_RECURRENT_TYPES if any(id(m) in recurrent for m in block.modules()) else set())
    }


def _has_own_head(entry: nn.Module) -> bool:
    return any(name in ("score", "classifier", "qa_outputs") for name, _ in entry.named_children())
