"""What a model is made of: vision towers, the decoder, and how each attends. The only file that knows a model's name.

Parts are found by structure: a stack of blocks is the longest list of equal blocks that hold attention; it is a vision
tower if its model takes pixels and a decoder if its attention is causal. `FAMILIES` adds what structure cannot tell.
A stack whose blocks hold anything that is not known to work token by token is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_sp.anatomy import (
    Anatomy,
    Features,
    LogitTransform,
    Seam,
    Spans,
    Stack,
    attention_like,
    is_hf,
    uses_door,
)
from triton_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """What can't be read off a part's structure, by the `model_type` of its configuration."""

    taps: str | None = None  # modules that the tower runs on the hidden states between its blocks
    embeddings: str | None = None  # the module that interpolates positions by the sizes of all images
    packs_plain_ids: bool = True  # (B, S) position_ids that restart mark packed documents
    packs_images: bool = False  # the tower packs images of the sizes that it is given, and masks one from the other


FAMILIES: dict[str, Family] = {
    # vision towers
    "clip_vision_model": Family(),
    "dinov2": Family(),
    "glm4v_vision": Family(embeddings="embeddings"),
    "idefics2": Family(),  # the towers' own model_type in some versions of transformers
    "idefics2_vision": Family(),
    "idefics3_vision": Family(),
    "internvl_vision": Family(),
    "pixtral": Family(packs_images=True),
    "qwen2_vl_vision": Family(),
    "qwen2_vl": Family(),  # the tower's own model_type in transformers < 5.20
    "qwen2_5_vl_vision": Family(),
    "qwen2_5_vl": Family(),
    "qwen3_vl_vision": Family(taps="deepstack_merger_list"),
    "qwen3_vl": Family(taps="deepstack_merger_list"),
    "qwen3_vl_moe_vision": Family(taps="deepstack_merger_list"),
    "siglip_vision_model": Family(),
    "smolvlm_vision": Family(),
    "vit": Family(),
    # decoders
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm4v_text": Family(packs_plain_ids=False),
    "gpt_neox": Family(),
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_vl_text": Family(packs_plain_ids=False),
    "qwen2_5_vl_text": Family(packs_plain_ids=False),
    "qwen3_vl_text": Family(),
    "qwen3_vl_moe_text": Family(),
}

_IMAGES = Features("get_image_features", "image_token_id", "images", beside=("image_sizes",))
_SAMPLES = Features("get_image_features", "image_token_id", "images", beside=("pixel_attention_mask",), samples=True)
_FRAMES = Features("get_video_features", "video_token_id", "frames")
_GRIDS = (
    Features("get_image_features", "image_token_id", "patches", beside=("image_grid_thw",)),
    Features("get_video_features", "video_token_id", "patches", beside=("video_grid_thw",)),
)
_FRAME_GRIDS = (  # frames of videos stand where images do
    _GRIDS[0],
    Features("get_video_features", "image_token_id", "patches", beside=("video_grid_thw",)),
)

# By the `model_type` of a composite's configuration: how its features are made and where they go.
SEAMS: dict[str, tuple[Features, ...]] = {
    "gemma3": (_IMAGES,),
    "glm4v": _FRAME_GRIDS,
    "idefics2": (_SAMPLES,),
    "idefics3": (_SAMPLES,),
    "internvl": (_IMAGES,),
    "llava": (_IMAGES,),
    "llava_next": (_IMAGES,),
    "llava_onevision": (_IMAGES, _FRAMES),
    "mistral3": (_IMAGES,),
    "paligemma": (_IMAGES,),
    "qwen2_5_vl": _GRIDS,
    "qwen2_vl": _GRIDS,
    "qwen3_vl": _GRIDS,
    "qwen3_vl_moe": _GRIDS,
    "smolvlm": (_SAMPLES,),
}

# By the `model_type` of a composite's configuration: the masks that it makes for its decoder.
SPANS: dict[str, Spans] = {
    "gemma3": Spans(token_type=1, single=False, cut=True, required=False),  # an image
    "paligemma": Spans(token_type=0, single=True, cut=False, required=True),  # the prefix: image and prompt
}

DECODER_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What transformers >= 5.17 computes about patches outside of its towers and lets callers give.
VISION_METADATA = {
    "get_vision_attention_seqlens",
    "get_vision_interpolation_indices_and_weights",
    "get_vision_position_ids",
    "get_vision_window_index",
}
_TOKEN_WISE = (
    "Norm",
    "Activation",
    "Dropout",
    "DropPath",
    "LayerScale",
    "Experts",
    "Router",
    "Identity",
    "GELU",
    "SiLU",
)
_BLOCK_PARAMETERS = {
    "hidden_states", "attention_mask", "cu_seqlens", "max_seqlen", "position_embeddings", "rotary_pos_emb",
    "position_ids", "past_key_values", "past_key_value", "use_cache", "cache_position", "output_attentions",
    "head_mask", "layer_head_mask", "causal_attention_mask", "layer_past", "kwargs",
}  # fmt: skip


def find(model: nn.Module) -> Anatomy:
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
        _sort_in(anatomy, owner, f"{names[id(owner)]}.{list_name}".strip("."), blocks, names)
    if not anatomy.stacks:
        raise UnsupportedModelError(
            type(model).__name__,
            expected="a stack of transformer blocks (a ModuleList or Sequential of equal blocks with attention)",
            found="none" + "".join(f"; {name}: {reason}" for name, reason in anatomy.whole),
            remedy="wrap the module that holds the blocks, or use triton_sp.wrappers in your own script",
        )
    if anatomy.decoder is not None and anatomy.towers:
        anatomy.seam = _find_seam(anatomy.decoder, anatomy.towers, entry, names)
    return anatomy


def _find_seam(decoder: Stack, towers: list[Stack], entry: nn.Module, names: dict[int, str]) -> Seam:
    """The innermost model around towers and decoder, and whether it can be given this rank's part of its inputs."""
    parts = [decoder.module, *(tower.module for tower in towers)]
    around = [m for m in entry.modules() if is_hf(m) and all(_contains(m, part) and m is not part for part in parts)]
    composite: Any = around[-1]
    family = composite.config.model_type
    features = SEAMS.get(family, ())
    why = "known family" if features else f"how {family} makes its features is not known"
    if len(towers) != 1 or not towers[0].door:
        features, why = (), "more than one vision tower, or one with attention of its own"
    if not all(_can_be_cut(feature, composite, towers[0].module) for feature in features):
        features, why = (), "this version of transformers makes features otherwise"
    return Seam(names[id(composite)], composite, features, why)


def _can_be_cut(features: Features, composite: Any, tower: nn.Module) -> bool:
    if not hasattr(composite, features.method) or not hasattr(composite.config, features.token):
        return False
    if features.cut == "frames":  # the method has to end videos itself; in 5.17 the composite does
        return "image_newline" in inspect.unwrap(getattr(type(composite), features.method)).__code__.co_names
    return features.cut == "images" or _takes_metadata(composite, tower)


def _takes_metadata(composite: nn.Module, tower: nn.Module) -> bool:
    """Whether a tower takes what it knows about its patches as arguments, and positions of text come from a method."""
    code = inspect.unwrap(type(tower).forward).__code__
    uses = {name for name in code.co_names if name.startswith("get_vision_")}
    return bool(uses) and uses <= VISION_METADATA and hasattr(composite, "compute_3d_position_ids")


def _hf_stacks(entry: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Module]]]:
    """For each innermost HF model its longest list of blocks with attention."""
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
            if any(attention_like(m) for block in blocks for m in block.modules())
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


def _takes_pixels(module: nn.Module) -> bool:
    key = getattr(module.config, "base_config_key", "")
    return key == "vision_config" or getattr(module, "main_input_name", "") == "pixel_values"


def _sort_in(anatomy: Anatomy, owner: nn.Module, name: str, blocks: list[nn.Module], names: dict[int, str]) -> None:
    # torch's checkpoint_wrapper puts a module around each block; the overrides belong on the block itself.
    blocks = [getattr(block, "_checkpoint_wrapped_module", block) for block in blocks]
    attention = [module for block in blocks for module in block.modules() if uses_door(module)]
    config: Any = owner.config
    family = config.model_type
    stack = Stack(name, owner, blocks, attention, family, door=bool(attention), known=family in FAMILIES)
    if _takes_pixels(owner):
        ancestors = [m for m in anatomy.entry.modules() if is_hf(m) and _takes_pixels(m) and _contains(m, owner)]
        stack.module = ancestors[0]
        stack.unit = int(getattr(owner, "spatial_merge_size", 1)) ** 2
        taps = FAMILIES.get(family, Family()).taps
        stack.taps = list(getattr(owner, taps)) if taps else []
        embeddings = FAMILIES.get(family, Family()).embeddings
        stack.embeddings = getattr(owner, embeddings) if embeddings else None
        if not attention:
            stack.attention = _opaque_units(blocks)
        stack.refusal = _refuse_blocks(stack, names)
        anatomy.towers.append(stack)
    elif attention and (_spans(anatomy.entry, owner) or all(getattr(m, "is_causal", False) for m in attention)):
        stack.spans = _spans(anatomy.entry, owner)
        stack.rotaries = [m for m in owner.children() if getattr(m, "rope_type", None) in ("dynamic", "longrope")]
        stack.refusal = _refuse_decoder(anatomy, stack, names)
        anatomy.decoder = stack
    elif attention and _embeds_tokens(owner):
        stack.refusal = UnsupportedModelError(
            name,
            expected="a decoder with causal attention",
            found=f"{type(attention[0]).__name__} with is_causal=False: the model around it makes its masks",
            remedy="use a causal model, or one whose masks triton_sp/models.py knows",
        )
        anatomy.decoder = stack
    elif attention:
        anatomy.whole.append((name, f"{family}: neither takes pixels nor is causal"))
    else:
        found = type(next(m for m in blocks[0].modules() if attention_like(m))).__name__
        stack.refusal = UnsupportedModelError(
            name,
            expected="attention that goes through transformers' attention interface",
            found=f"{found}, which computes attention itself",
            remedy="this text model cannot be sharded; use one whose attention calls ALL_ATTENTION_FUNCTIONS",
        )
        anatomy.decoder = stack


def _embeds_tokens(owner: nn.Module) -> bool:
    """Whether a model reads token ids; a resampler of image features does not."""
    return isinstance(getattr(owner, "embed_tokens", None), nn.Embedding)


def _spans(entry: nn.Module, decoder: nn.Module) -> Spans | None:
    """The masks that the innermost model around a decoder makes for it, as transformers >= 5 composes them: before,
    sliding windows met spans another way, which is refused then."""
    around: list[Any] = [m for m in entry.modules() if is_hf(m) and m is not decoder and _contains(m, decoder)]
    if not around or around[-1].config.model_type not in SPANS:
        return None
    from transformers import masking_utils

    return SPANS[around[-1].config.model_type] if hasattr(masking_utils, "blockwise_overlay") else None


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(candidate is part for candidate in module.modules())


def _refuse_blocks(stack: Stack, names: dict[int, str]) -> UnsupportedModelError | None:
    """The first reason why the blocks of a stack would not compute the same on a shard, or None."""
    block = stack.blocks[0]
    unknown = set(inspect.signature(type(block).forward).parameters) - _BLOCK_PARAMETERS - {"self", "x"}
    if stack.door and unknown:
        return UnsupportedModelError(
            names[id(block)],
            expected=f"a block that takes {sorted(_BLOCK_PARAMETERS - {'kwargs'})}",
            found=f"parameters {sorted(unknown)}, which may or may not run along the tokens",
            remedy="add the family to triton_sp/models.py once its blocks are known to be right on a shard",
        )
    if not stack.door:
        return None  # proven by a trial on the first call instead, see wrappers/trial.py
    modules = [module for block in stack.blocks for module in block.modules()]
    return next((refusal for module in modules if (refusal := _refuse_layer(module, names))), None)


def _refuse_layer(module: nn.Module, names: dict[int, str]) -> UnsupportedModelError | None:
    name = names.get(id(module), type(module).__name__)
    own = [name for name, _ in module.named_parameters(recurse=False)]
    leaf = not any(True for _ in module.children())
    if getattr(module, "drop_prob", 0):
        return _refuse_stochastic_depth(name, module)
    if uses_door(module) and own:
        return UnsupportedModelError(
            name,
            expected="attention whose parameters all lie in layers that work token by token",
            found=f"parameters {own} of its own",
            remedy="use a model without them; attention sinks and learned biases are not handled yet",
        )
    if leaf and not _token_wise(module) and not uses_door(module):
        return UnsupportedModelError(
            name,
            expected="blocks of attention and of layers that work token by token",
            found=type(module).__name__,
            remedy="add the layer to triton_sp/models.py if each of its outputs depends on one token alone",
        )
    return None


def _refuse_stochastic_depth(name: str, module: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        name,
        expected="blocks without stochastic depth, which drops images and not tokens",
        found=f"drop_prob={module.drop_prob}",
        remedy="set the drop path rate of the configuration to 0",
    )


def _token_wise(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, nn.Identity, nn.ParameterDict, nn.ModuleDict, nn.ModuleList)):
        return True
    source = type(module).__module__
    if source.startswith(("torch.nn.modules.activation", "transformers.activations")):
        return not attention_like(module)
    return any(word in type(module).__name__ for word in _TOKEN_WISE)


def _refuse_decoder(anatomy: Anatomy, stack: Stack, names: dict[int, str]) -> UnsupportedModelError | None:
    config: Any = stack.module.config
    kinds = set(getattr(config, "layer_types", None) or ()) - DECODER_LAYER_TYPES
    if kinds:
        return UnsupportedModelError(
            stack.name,
            expected=f"layers of the types {sorted(DECODER_LAYER_TYPES)}",
            found=f"{sorted(kinds)} in config.layer_types",
            remedy="use a model without them; their masks are not handled yet",
        )
    parameters = inspect.signature(type(stack.module).forward).parameters
    missing = {"inputs_embeds", "position_ids", "attention_mask"} - set(parameters)
    rotary = any("rotary" in type(module).__name__.lower() for module in stack.module.modules())
    if missing or not rotary:
        return UnsupportedModelError(
            stack.name,
            expected="a decoder whose positions enter by rotary embeddings of position_ids",
            found=f"a {type(stack.module).__name__} without {sorted(missing) or 'a rotary embedding'}",
            remedy="use a rotary model; ALiBi and learned positions count local tokens",
        )
    entry = anatomy.entry
    head = getattr(entry, "get_output_embeddings", lambda: None)()
    if entry is not stack.module and head is None and _has_own_head(entry):
        return UnsupportedModelError(
            type(entry).__name__,
            expected="a model that ends in a language-modelling head, or the model without a head",
            found="a head that picks or pools tokens of the whole sequence",
            remedy="wrap the base model and gather its hidden states (SPConfig(gather_logits=True))",
        )
    return _refuse_blocks(stack, names)


def _has_own_head(entry: nn.Module) -> bool:
    return any(name in ("score", "classifier", "qa_outputs") for name, _ in entry.named_children())


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
    """A stack of blocks about which nothing is known but that they run one after another."""
    units = _opaque_units(blocks)
    first = any(isinstance(unit, nn.MultiheadAttention) and not unit.batch_first for unit in units)
    first = first and not any(_code_names(m) & {"permute", "transpose", "movedim"} for m in blocks[0].modules())
    stack = Stack(name, owner, blocks, units, type(owner).__name__, door=False, tokens_first=first)
    modules = [module for block in blocks for module in block.modules()]
    dropping = next((module for module in modules if getattr(module, "drop_prob", 0)), None)
    if dropping is not None:
        stack.refusal = _refuse_stochastic_depth(name, dropping)
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


def _opaque_units(blocks: list[nn.Module]) -> list[nn.Module]:
    """The outermost attention modules of each block, or the block where it has none of its own."""
    units: list[nn.Module] = []
    for block in blocks:
        inside = [module for module in block.modules() if module is not block and attention_like(module)]
        nested = {id(m) for module in inside for m in module.modules() if m is not module}
        units += [module for module in inside if id(module) not in nested] or [block]
    return units


def expected_window(attention: nn.Module) -> int | None:
    """The sliding window that a decoder's mask would apply in the layer of this attention module."""
    config: Any = attention.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    if kinds and index is not None:
        return window if kinds[index] == "sliding_attention" else None
    return window


def packs_images(tower: Stack) -> bool:
    """Whether a tower makes one sequence of images of different sizes without telling its blocks where each begins."""
    return FAMILIES.get(tower.family, Family()).packs_images


def packed_images(tower: Stack, arguments: dict[str, Any]) -> torch.Tensor:
    """cu_seqlens of the patches of such images, from the arguments of the tower."""
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    sizes = [pixels.shape[-2:]] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
    module: Any = tower.module
    lengths = [(height // module.patch_size) * (width // module.patch_size) for height, width in sizes]
    return torch.tensor([0, *lengths], device=pixels.device).cumsum(0).to(torch.int32)


def packs_plain_ids(decoder: Stack) -> bool:
    """Whether (B, S) position_ids that restart mark packed documents, as the model's own mask would have it."""
    return FAMILIES.get(decoder.family, Family()).packs_plain_ids


def first_position(composite: nn.Module) -> int:
    """The position of a sequence's first token, where a composite model numbers them itself."""
    config: Any = composite.config
    return 1 if config.model_type == "paligemma" else 0


def causal_lm_loss(entry: nn.Module) -> bool:
    """Whether the model's own loss is the shifted cross entropy that loss.py shards."""
    loss = getattr(entry, "loss_function", None)
    return loss is None or getattr(loss, "__name__", "") == "ForCausalLMLoss"


def logit_transform(entry: nn.Module) -> LogitTransform:
    """What the configuration says that the model does to its logits; wrappers/head.py holds the model to it."""
    config: Any = entry.config
    config = config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
