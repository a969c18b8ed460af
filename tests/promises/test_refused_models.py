"""Models that cannot be sharded are refused, by the module at fault: at `wrap`, or in the first forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from kit import tiny, zoo
from kit.refusals import errors_of
from torch import nn

import triton_sp
from triton_sp import SPConfig
from triton_sp.anatomy import families
from triton_sp.errors import InputError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("started")


def tower_with_conv() -> nn.Module:
    model = zoo.CASES["vit"].model()
    model.layers[1].mlp.conv = nn.Conv1d(48, 48, 3, padding=1)
    return model


def composite(name: str, vision: Any, text: Any, **options: Any) -> nn.Module:
    config = getattr(hf, f"{name}Config")(vision_config=vision.to_dict(), text_config=text.to_dict(), **options)
    return tiny.build(f"{name}ForConditionalGeneration", config, "sdpa", torch.float64)


def from_config(model: str, config: str, **options: Any) -> nn.Module:
    common = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": tiny.VOCAB}
    return tiny.build(model, getattr(hf, config)(**(common | options)), "eager", torch.float32)


def with_dropout(model: nn.Module) -> nn.Module:
    for config in (model.config.text_config, model.config.vision_config):
        config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model


def arange_in_attention() -> nn.Module:
    """A relative of Llama 4 that nobody has looked at, which numbers the tokens of a shard."""
    model = zoo.CASES["llama4_text"].model()
    model.config.model_type = "llama5_text"
    return model.model


def attention_with_a_bias() -> nn.Module:
    """Of which nobody knows what its attention does with it."""
    model = zoo.CASES["llama"].model()
    model.model.layers[0].self_attn.bias = nn.Parameter(torch.zeros(12))
    return model.model


AT_WRAP: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # With a head to predict the next token they get the hidden states of all tokens; without one they may pool them.
    "falcon": (lambda: from_config("FalconModel", "FalconConfig"), "h", "FalconAttention"),
    "bloom": (lambda: from_config("BloomModel", "BloomConfig"), "h", "BloomAttention"),
    "mpt": (lambda: from_config("MptModel", "MptConfig", d_model=96, n_heads=12, n_layers=2), "blocks", "MptAttention"),
    "clip_text": (
        lambda: from_config("CLIPTextModel", "CLIPTextConfig", intermediate_size=64),
        "CLIPTextModel",
        "clip_text_model: neither takes pixels nor is causal",
    ),
    "classifier": (
        lambda: tiny.build("LlamaForSequenceClassification", tiny.text_config("Llama"), "sdpa", torch.float64),
        "LlamaForSequenceClassification",
        "pools tokens",
    ),
    "conv": (tower_with_conv, "layers.1.mlp.conv", "Conv1d"),
    "drop_path": (
        lambda: tiny.build("Dinov2Model", tiny.vision_config("Dinov2", drop_path_rate=0.1), "sdpa", torch.float64),
        "drop_path",
        "drop_prob",
    ),
    "bias": (attention_with_a_bias, "self_attn", "['bias']"),
    "arange": (arange_in_attention, "self_attn", "arange"),
    "minimax": (
        lambda: from_config("MiniMaxModel", "MiniMaxConfig", num_local_experts=2, num_key_value_heads=12),
        "layers",
        "linear_attention",
    ),
}


def run_wrap(name: str) -> None:
    triton_sp.wrap(AT_WRAP[name][0]())


@pytest.mark.parametrize("name", AT_WRAP)
def test_models(ranks, name: str) -> None:
    _, field, found = AT_WRAP[name]
    for error in errors_of(ranks, run_wrap, name, size=1):
        assert type(error) is UnsupportedModelError
        assert field in error.field and found in str(error)


def gemma3() -> nn.Module:
    vision = tiny.vision_config("SiglipVision", 4, vision_use_head=False)
    text = tiny.text_config("Gemma3Text")
    return composite("Gemma3", vision, text, mm_tokens_per_image=4, image_token_index=tiny.IMAGE)


def paligemma() -> nn.Module:
    vision = tiny.vision_config("SiglipVision", 4, vision_use_head=False)
    return composite("PaliGemma", vision, tiny.text_config("Gemma"), image_token_index=tiny.IMAGE, projection_dim=96)


def run_gemma3() -> None:
    model, ids = triton_sp.wrap(gemma3()), torch.tensor([[tiny.IMAGE] * 4 + [7, 8, 9]])
    pixels = tiny.pixels(1, 3, 4 * tiny.PATCH, 4 * tiny.PATCH, dtype=torch.float64)
    model(input_ids=ids, token_type_ids=(ids == tiny.IMAGE).long(), pixel_values=pixels, labels=ids)


def run_unknown(job: Callable[[], None]) -> None:
    with mock.patch.dict(families.SPANS, clear=True):
        job()


def test_masks_of_a_composite_that_is_not_known(ranks) -> None:
    for error in errors_of(ranks, run_unknown, run_gemma3):
        assert type(error) is UnsupportedModelError
        assert error.field == "model.language_model.layers" and "the composite model made itself" in error.found


# token_type_ids of rows of 4, 1 where Gemma 3 has images and 0 where PaliGemma has its prefix: the field at fault, and
# what is found there.
SPANS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[Any]], str, str]] = {
    "no_types": (paligemma, {}, "token_type_ids", "none"),
    "types_shape": (gemma3, {"token_type_ids": [[0] * 3]}, "token_type_ids", "(1, 3)"),
    "two_prefixes": (paligemma, {"token_type_ids": [[1] * 4, [0, 1, 0, 1]]}, "token_type_ids", "2 in row 1"),
    "prefix_learns": (
        paligemma,
        {"token_type_ids": [[0] * 4], "attention_mask": [[0, 1, 1, 1]], "labels": [[-100, 6, 7, 8]]},
        "labels",
        "row 0",
    ),
    "documents_in_an_image": (
        gemma3,
        {"token_type_ids": [[0] * 4, [0, 1, 1, 0]], "position_ids": [[0, 1, 2, 3], [0, 1, 0, 1]]},
        "position_ids",
        "row 1",
    ),
}


def run_spans(name: str) -> None:
    build, fields, *_ = SPANS[name]
    batch = {field: torch.tensor(value) for field, value in fields.items()}
    rows = max([1, *(len(value) for value in batch.values())])
    triton_sp.wrap(build())(input_ids=torch.full((rows, 4), 7), **batch)


@pytest.mark.parametrize("name", SPANS)
def test_spans(ranks, name: str) -> None:
    *_, field, found = SPANS[name]
    for error in errors_of(ranks, run_spans, name):
        assert type(error) is InputError and error.field == field and found in error.found, error


class Hidden(nn.Module):
    """Holds modules as a ModuleList does, and is none."""

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))


def run_read_between_blocks() -> None:
    """A tower that reads hidden states between its blocks where nobody looks for it."""
    case = zoo.CASES["qwen3_vl"]
    model, batch = case.build(case.dtype), case.batches["left_pad"](case.dtype)
    model.model.visual.deepstack_merger_list = Hidden(model.model.visual.deepstack_merger_list)
    triton_sp.wrap(model, config=SPConfig(plan="heads"))(**batch)


def test_a_tower_that_reads_between_its_blocks(ranks) -> None:
    for error in errors_of(ranks, run_read_between_blocks):
        assert type(error) is UnsupportedModelError and "between blocks" in error.found
