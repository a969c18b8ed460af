"""The classes of transformers' mappings, and a tiny model of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.models.llama4 import modeling_llama4 as llama4
from zoo.entries import ENTRIES, FLOAT32, TEXT_CONFIGS
from zoo.shrink import shrink

KINDS = {
    "vlm": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "vision": modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
}


def classes(kind: str) -> Iterator[tuple[str, str]]:
    """(model_type, name of the class) of each class of a mapping, once."""
    seen = set()
    for model_type, names in sorted(KINDS[kind].items()):
        name = names if isinstance(names, str) else names[0]
        if name not in seen:
            seen.add(name)
            yield model_type, name


def tiny_config(model_type: str) -> Any:
    """A small configuration of a model_type."""
    kind = configuration_auto.CONFIG_MAPPING[model_type]
    values = shrink(kind().to_dict())
    for name in ("architectures", "model_type", "transformers_version"):
        values.pop(name, None)
    for name, value in ENTRIES.get(model_type, {}).items():
        *parts, last = name.split(".")
        place = values
        for part in parts:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        place[last] = value
    return kind(**values)


def _eager_but_text(config: Any, kind: Any) -> str | dict[str, str]:
    """Eager attention, but of the text model of a composite, if that has another."""
    if "text_config" not in config.sub_configs:
        return "eager"
    parts = {"": "eager"} | {name: "sdpa" if name == "text_config" else "eager" for name in config.sub_configs}
    try:
        kind._from_config(copy.deepcopy(config), attn_implementation=parts)
    except ValueError:
        return "eager"
    return parts


def build(model_type: str, name: str, kind: str) -> nn.Module:
    """The model in float64, the same in every process; noise on every weight, so that zeros and ones have informative
    gradients too. In float32 where text is attended to by eager attention: in float64 its masks overflow in a softmax
    of float32, and rows that see nothing, of padding, are NaN in the model itself."""
    config = tiny_config(model_type)
    if kind == "vision" and not isinstance(config, getattr(hf, name).config_class):
        config = config.vision_config
    if kind == "causal" and model_type in TEXT_CONFIGS:
        config = config.get_text_config(decoder=True)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part._experts_implementation = "eager"  # the grouped one does not run in float64
            part.use_cache = False  # with a cache at hand transformers does not look for packed documents
    if hasattr(llama4, "MoeCausalLMOutputWithPast"):
        # Transformers 5.24 reads a field that the output of its own decoder does not have.
        setattr(llama4.MoeCausalLMOutputWithPast, "image_outputs", None)  # noqa: B010
    torch.manual_seed(0)
    kind_of_model, dtype = getattr(hf, name), torch.float64
    try:
        model = kind_of_model._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = kind_of_model._from_config(config, attn_implementation=_eager_but_text(config, kind_of_model))
        dtype = torch.float32 if kind == "causal" else dtype
    if model_type in FLOAT32:
        dtype = torch.float32
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for part in model.modules():  # what is drawn at random has no one answer
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.to(dtype).train()
