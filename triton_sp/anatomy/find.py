"""What a model is made of: vision towers, the decoder, and how each attends.

Parts are found by structure: a stack of blocks is the longest list of equal blocks that hold attention; it is a vision
tower if its model takes pixels and a decoder if its attention is causal. families.py adds what structure cannot tell.
A stack whose blocks hold anything that is not known to work token by token is refused by name, see refusals.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_sp.anatomy.families import FAMILIES, PROVEN, Family, spans_of
from triton_sp.anatomy.fusion import find_fusion
from triton_sp.anatomy.meeting import gather_instead, takes_tokens
from triton_sp.anatomy.parts import (
    Anatomy,
    Stack,
    attention_like,
    calls_attention_interface,
    contains,
    is_hf,
)
from triton_sp.anatomy.recurrent import functions_of, recurrent_layers
from triton_sp.anatomy.refusals import (
    refuse_blocks,
    refuse_decoder,
    refuse_stochastic_depth,
    refuse_text_attention,
)
from triton_sp.errors import UnsupportedModelError


def find_parts(model: nn.Module) -> Anatomy:
    """Find the parts of a model; `Stack.refusal` says which of them cannot be sharded correctly.

    Raises:
        UnsupportedModelError: there is nothing to shard.
    """
    entry = next((module for module in model.modules() if is_hf(module)), model)
    names = {id(module): name for name, module in model.named_modules()}
    anatomy = Anatomy(entry, [], None, [])
    if entry is model and not is_hf(model):
        anatomy.towers.extend(_opaque_stacks(model, names))
    for owner, list_name, blocks in _hf_stacks(entry):
        name, whole = f"{names[id(owner)]}.{list_name}".strip("."), FAMILIES.get(_family(owner), Family()).whole
        if whole:
            anatomy.unsharded.append((name, whole))
        else:
            _sort_in(anatomy, owner, name, blocks, names)
    if not anatomy.stacks:
        raise UnsupportedModelError(
            type(model).__name__,
            expected="a stack of transformer blocks (a ModuleList or Sequential of equal blocks with attention)",
            found="none" + "".join(f"; {name}: {reason}" for name, reason in anatomy.unsharded),
            remedy="wrap the module that holds the blocks, or use triton_sp.modules.encoder in your own script",
        )
    if anatomy.decoder is not None:
        anatomy.fusion = find_fusion(anatomy.decoder, anatomy.towers, entry, names)
    return anatomy


def _hf_stacks(entry: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Module]]]:
    """For each innermost HF model its longest list of blocks with attention, or with known recurrent layers."""
    for owner in entry.modules():
        if not is_hf(owner):
            continue
        lists = [
            (name, list(module))
            for name, module in owner.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and _innermost_model(owner, name) is owner
        ]
        lists = [
            (name, blocks)
            for name, blocks in lists
            if any(attention_like(m) or functions_of(m) for block in blocks for m in block.modules())
        ]
        if lists:
            name, blocks = max(lists, key=lambda item: len(item[1]))
            yield owner, name, blocks


def _innermost_model(owner: nn.Module, path: str) -> nn.Module:
    module = innermost = owner
    for part in path.split("."):
        module = getattr(module, part)
        if is_hf(module):
            innermost = module
    return innermost


def _family(owner: nn.Module) -> str:
    config: Any = owner.config
    return config.model_type


def _takes_pixels(module: nn.Module) -> bool:
    key = getattr(module.config, "base_config_key", "")
    first = [*inspect.signature(type(module).forward).parameters, "", ""][1]
    return key == "vision_config" or "pixel_values" in (first, getattr(module, "main_input_name", ""))


def _sort_in(anatomy: Anatomy, owner: nn.Module, name: str, blocks: list[nn.Module], names: dict[int, str]) -> None:
    # torch's checkpoint_wrapper puts a module around each block; the overrides belong on the block itself.
    blocks = [getattr(block, "_checkpoint_wrapped_module", block) for block in blocks]
    attention = _without_cross_attention(blocks, list(_self_attention(blocks)))
    family = _family(owner)
    recurrent = recurrent_layers(blocks)
    known = bool(attention or recurrent)
    stack = Stack(name, owner, blocks, attention, family, by_interface=known, proven=family in PROVEN)
    stack.recurrent = recurrent
    stack.spans = spans_of(anatomy.entry, owner)
    if _takes_pixels(owner):
        _describe_tower(stack, owner, anatomy.entry)
        stack.refusal = refuse_blocks(stack, names)
        anatomy.towers.append(stack)
    elif known and takes_tokens(owner) and (stack.spans or all(getattr(m, "is_causal", False) for m in attention)):
        _describe_positions(stack, owner)
        stack.refusal = refuse_decoder(anatomy, stack, names)
        anatomy.decoder = stack
    elif (attention and not _embeds_tokens(owner)) or not takes_tokens(owner):
        anatomy.unsharded.append((name, f"{family}: neither takes pixels nor is causal"))
    else:
        _describe_positions(stack, owner)
        stack.refusal = refuse_text_attention(stack)
        anatomy.decoder = stack
    if stack is anatomy.decoder and stack.refusal is not None:
        gather_instead(stack, anatomy.entry, names)


def _describe_positions(stack: Stack, owner: nn.Module) -> None:
    stack.rotaries = [m for m in owner.children() if getattr(m, "rope_type", None) in ("dynamic", "longrope")]
    stack.outside = [module for part in _outside(owner, stack.blocks) for module in part.modules()]
    stack.learned_positions = _learned_positions(stack)


def _self_attention(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose attention is sharded. One that reads another sequence works token by token, see
    wrappers/decoders/cross.py."""
    for module in (module for block in blocks for module in block.modules()):
        taken = inspect.signature(type(module).forward).parameters
        if calls_attention_interface(module) and "cross_attention_states" not in taken:
            yield module


def _without_cross_attention(blocks: list[nn.Module], attention: list[nn.Module]) -> list[nn.Module]:
    """A decoder by itself reads no encoder's states, and is not given any (wrappers/inputs/batch.py): what would attend
    to them is not called."""
    causal = [module for module in attention if getattr(module, "is_causal", False)]
    reads = "encoder_hidden_states" in inspect.signature(type(blocks[0]).forward).parameters
    return causal if causal and reads else attention


def _describe_tower(stack: Stack, owner: nn.Module, entry: nn.Module) -> None:
    """Fill in what a vision tower has outside of its blocks."""
    stack.module = _tower_around(owner, entry)
    stack.unit = int(getattr(owner, "spatial_merge_size", 1)) ** 2
    parts = list(_outside(owner, stack.blocks))
    stack.side_modules = [module for part in parts if isinstance(part, nn.ModuleList) for module in part]
    stack.outside = [module for part in parts if not isinstance(part, nn.ModuleList) for module in part.modules()]
    stack.embeddings = next((part for part in parts if _knows_sizes(part)), None)
    if not stack.attention:
        stack.attention = _opaque_attention(stack.blocks)


def _tower_around(owner: nn.Module, entry: nn.Module) -> nn.Module:
    """The outermost model around blocks that takes pixels only; one around a tower and a decoder may say that it takes
    them, too (BLIP and BLIP-2)."""
    around = [m for m in entry.modules() if is_hf(m) and _takes_pixels(m) and contains(m, owner)]
    return next((m for m in around if not any(map(_takes_tokens, m.modules()))), owner)


def _takes_tokens(module: nn.Module) -> bool:
    """Whether a module reads token ids, or is a model that hands them on."""
    return _embeds_tokens(module) or (
        is_hf(module) and "input_ids" in inspect.signature(type(module).forward).parameters
    )


def _knows_sizes(part: nn.Module) -> bool:
    """Whether a part of a tower interpolates positions by the sizes of all images, as GLM-4V's embeddings do."""
    return {"lengths", "image_shapes"} <= set(inspect.signature(type(part).forward).parameters)


def _outside(owner: nn.Module, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The outermost parts of a model that hold none of its blocks."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for part in owner.children():
        held = [id(module) in inside for module in part.modules()]
        if not any(held):
            yield part
        elif not held[0]:
            yield from _outside(part, blocks)


def _learned_positions(stack: Stack) -> nn.Module | None:
    """The table beside the one of tokens, if there is one more, or one of that name. Whether it is looked up by
    position is seen when the decoder runs."""
    model: Any = stack.module
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:  # a model of sounds
        return None
    tables = {m: "" for m in stack.outside if isinstance(m, nn.Embedding) and m is not tokens}
    tables |= {module: name for name, module in model.named_modules() if module in tables}
    tables = {module: name for module, name in tables.items() if "segment" not in name}  # Kosmos-2.5's, of pictures
    named = [module for module, name in tables.items() if "position" in name.rpartition(".")[2]]
    found = list(tables) if len(tables) == 1 else named
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return found[0] if len(found) == 1 and not rotary else None


def _embeds_tokens(owner: nn.Module) -> bool:
    """Whether a model reads token ids; a resampler of image features does not."""
    return isinstance(getattr(owner, "embed_tokens", None), nn.Embedding)


# --- models that are not from Hugging Face -------------------------------------------------------------------------


def _opaque_stacks(model: nn.Module, names: dict[int, str]) -> Iterator[Stack]:
    """The longest list of equal blocks that attend."""
    candidates = [
        (names[id(module)], list(module))
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module)
        and len({type(block) for block in module}) == 1
        and any(attention_like(m) or _multiplies_queries(m) for m in next(iter(module)).modules())
    ]
    if candidates:
        name, blocks = max(candidates, key=lambda item: len(item[1]))
        yield opaque_stack(name, model, blocks)


def opaque_stack(name: str, owner: nn.Module, blocks: list[nn.Module]) -> Stack:
    """A stack of blocks of which only this is known: they run one after another."""
    attention = _opaque_attention(blocks)
    first = any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in attention)
    first = first and not any(_code_names(m) & {"permute", "transpose", "movedim"} for m in blocks[0].modules())
    stack = Stack(name, owner, blocks, attention, type(owner).__name__, by_interface=False, tokens_first=first)
    modules = [module for block in blocks for module in block.modules()]
    dropping = next((module for module in modules if getattr(module, "drop_prob", 0)), None)
    if dropping is not None:
        stack.refusal = refuse_stochastic_depth(name, dropping)
    batch_norm = next((module for module in modules if isinstance(module, _BatchNorm)), None)
    if batch_norm is not None:
        stack.refusal = UnsupportedModelError(
            name,
            expected="blocks in which tokens meet in attention only",
            found=f"a {type(batch_norm).__name__}, whose statistics are those of all tokens",
            remedy="use blocks with LayerNorm",
        )
    return stack


def _code_names(module: nn.Module) -> set[str]:
    """The names that the code of a module's class uses, if it is not torch's own."""
    if type(module).__module__.startswith("torch."):
        return set()
    methods = [value for value in vars(type(module)).values() if inspect.isfunction(value)]
    return {name for method in methods for name in method.__code__.co_names}


def _multiplies_queries(module: nn.Module) -> bool:
    return bool(_code_names(module) & {"scaled_dot_product_attention", "softmax"})


def _opaque_attention(blocks: list[nn.Module]) -> list[nn.Module]:
    """The outermost attention modules of each block, or the block where it has none of its own."""
    attention: list[nn.Module] = []
    for block in blocks:
        inside = [module for module in block.modules() if module is not block and attention_like(module)]
        nested = {id(m) for module in inside for m in module.modules() if m is not module}
        attention += [module for module in inside if id(module) not in nested] or [block]
    return attention
