"""What cannot be done is said: what was expected, found and the remedy, on every rank, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from kit import tiny, zoo
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh

import triton_sp
from triton_sp import SPConfig, errors
from triton_sp.anatomy import families
from triton_sp.errors import DisagreementError, GroupError, InputError, UnsupportedModelError
from triton_sp.testing import RankError

SECONDS = 60.0  # a rank that waits for another would wait for half an hour; the rest is room for a busy machine


def errors_of(ranks, job: Callable[..., Any], *args: Any, size: int = 2) -> list[errors.SPError]:
    """What each rank raised, in rank order: every one of them has to."""
    with pytest.raises(RankError) as caught:
        ranks.run(job, *args, ranks=size, timeout=SECONDS)
    raised = [caught.value.errors[rank] for rank in range(size)]
    for error in raised:
        assert isinstance(error, errors.SPError), error
        assert error.field and error.expected and error.found and error.remedy
        assert f"{error.field}: expected {error.expected}, found {error.found}. Remedy: {error.remedy}." in str(error)
    return raised


def ready() -> None:
    """Started, and everything imported."""


@pytest.fixture(autouse=True, scope="module")
def started(ranks) -> None:
    """On a busy machine this takes longer than a rank that answers may take here."""
    ranks.run(ready, ranks=3, timeout=1000)


def causal(family: str, **options: Any) -> nn.Module:
    return tiny.build(f"{family}ForCausalLM", tiny.text_config(family, **options), "sdpa", torch.float64)


# --- arguments of wrap ---------------------------------------------------------------------------------------------


def test_without_a_process_group() -> None:
    with pytest.raises(GroupError, match="torchrun"):
        triton_sp.wrap(nn.Linear(2, 2))


def foreign_group() -> None:
    group = dist.new_group([0])
    triton_sp.wrap(causal("Llama"), group if dist.get_rank() else dist.new_group([1]))


def sync_over_axes() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp"))
    triton_sp.sync_gradients(triton_sp.wrap(causal("Llama"), mesh), mesh)


def wrong_mesh() -> None:
    triton_sp.wrap(causal("Llama"), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")))


def other_settings() -> None:
    model = triton_sp.wrap(causal("Llama"))
    triton_sp.wrap(model, config=SPConfig(gradient="sum"))


class AddsInPart:
    """An mpu that tells the size of its sequence group, as DeepSpeed's own does."""

    def get_sequence_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size()


def mpu_that_adds_in_part() -> None:
    triton_sp.unwrap(triton_sp.wrap(causal("Llama"), AddsInPart(), SPConfig(gradient="sum")))  # said which: accepted
    triton_sp.wrap(causal("Llama"), AddsInPart())


ARGUMENTS: dict[str, tuple[Callable[[], Any], type[errors.SPError], str, str]] = {
    "model": (lambda: triton_sp.wrap("llama"), InputError, "model", "str"),
    "config": (lambda: triton_sp.wrap(causal("Llama"), None, "mean"), InputError, "config", "str"),
    "gradient": (lambda: SPConfig(gradient="average"), InputError, "SPConfig.gradient", "average"),
    "mpu": (mpu_that_adds_in_part, InputError, "SPConfig.gradient", "'auto'"),
    "check": (lambda: SPConfig(check=True), InputError, "SPConfig.check", "True"),
    "group": (lambda: triton_sp.wrap(causal("Llama"), 2), GroupError, "group", "int"),
    "foreign_group": (foreign_group, GroupError, "group", "a group of other ranks"),
    "wrong_mesh": (wrong_mesh, GroupError, "group", "'dp', 'tp'"),
    "sync_over_axes": (sync_over_axes, GroupError, "group", "'dp', 'sp'"),
    "other_settings": (other_settings, InputError, "model", "sum"),
    "nothing_to_shard": (lambda: triton_sp.wrap(nn.Linear(2, 2)), UnsupportedModelError, "Linear", "none"),
    "not_wrapped": (lambda: triton_sp.sync_gradients(causal("Llama")), GroupError, "model", "without a group"),
}


def run_argument(name: str) -> None:
    ARGUMENTS[name][0]()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(ranks, name: str) -> None:
    _, kind, field, found = ARGUMENTS[name]
    for error in errors_of(ranks, run_argument, name):
        assert type(error) is kind and error.field == field and found in error.found


# --- models --------------------------------------------------------------------------------------------------------


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
    return model


def attention_with_a_bias() -> nn.Module:
    """Of which nobody knows what its attention does with it."""
    model = zoo.CASES["llama"].model()
    model.model.layers[0].self_attn.bias = nn.Parameter(torch.zeros(12))
    return model


AT_WRAP: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "falcon": (lambda: from_config("FalconForCausalLM", "FalconConfig"), "transformer.h", "FalconAttention"),
    "bloom": (lambda: from_config("BloomForCausalLM", "BloomConfig"), "transformer.h", "BloomAttention"),
    "mpt": (
        lambda: from_config("MptForCausalLM", "MptConfig", d_model=96, n_heads=12, n_layers=2),
        "transformer.blocks",
        "MptAttention",
    ),
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
        lambda: from_config("MiniMaxForCausalLM", "MiniMaxConfig", num_local_experts=2, num_key_value_heads=12),
        "model.layers",
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


def run_paligemma() -> None:
    triton_sp.wrap(paligemma())


def run_unknown(job: Callable[[], None]) -> None:
    with mock.patch.dict(families.SPANS, clear=True):
        job()


@pytest.mark.parametrize(
    ("job", "found"), [(run_gemma3, "the composite model made itself"), (run_paligemma, "is_causal")]
)
def test_masks_of_a_composite_that_is_not_known(ranks, job: Callable[[], None], found: str) -> None:
    for error in errors_of(ranks, run_unknown, job):
        assert type(error) is UnsupportedModelError
        assert error.field == "model.language_model.layers" and found in error.found


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


# --- a batch -------------------------------------------------------------------------------------------------------


def ids(length: int = 6) -> torch.Tensor:
    return torch.arange(tiny.FIRST_TEXT, tiny.FIRST_TEXT + 2 * length).view(2, length)


def holes() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])}


def label_after_the_end() -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return {"input_ids": ids(), "attention_mask": mask, "labels": ids()}


BATCHES: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "use_cache": (lambda: {"input_ids": ids(), "use_cache": True}, "use_cache", "True"),
    "past": (lambda: {"input_ids": ids(), "past_key_values": hf.DynamicCache()}, "past_key_values", "DynamicCache"),
    "holes": (holes, "attention_mask", "row 1"),
    "only_padding": (lambda: {"input_ids": ids(), "attention_mask": 0 * ids()}, "attention_mask", "only padding"),
    "mask_shape": (lambda: {"input_ids": ids(), "attention_mask": ids(5)}, "attention_mask", "(2, 5)"),
    "mask_type": (lambda: {"input_ids": ids(), "attention_mask": [[1] * 6] * 2}, "attention_mask", "list"),
    "labels_shape": (lambda: {"input_ids": ids(), "labels": ids(7)}, "labels", "(2, 7)"),
    "late_label": (label_after_the_end, "labels", "row 1"),
    "nothing": (lambda: {"labels": ids()}, "input_ids", "neither"),
    "unbatched": (lambda: {"input_ids": ids()[0]}, "input_ids", "(6,)"),
    "ids_type": (lambda: {"input_ids": ids().tolist()}, "input_ids", "list"),
    "float_ids": (lambda: {"input_ids": ids().float()}, "input_ids", "float32"),
    "positions": (lambda: {"input_ids": ids(), "position_ids": torch.arange(5)[None]}, "position_ids", "(1, 5)"),
    "documents": (lambda: {"input_ids": ids(), "cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q", "none"),
    "weights": (lambda: {"input_ids": ids(), "output_attentions": True}, "output_attentions", "True"),
    "states": (lambda: {"input_ids": ids(), "output_hidden_states": True}, "output_hidden_states", "True"),
    "keep": (lambda: {"input_ids": ids(), "logits_to_keep": 1}, "logits_to_keep", "1"),
    "shifted": (lambda: {"input_ids": ids(), "shift_labels": ids()}, "shift_labels", "(2, 6)"),
    "unknown": (lambda: {"input_ids": ids(), "segment_ids": ids()}, "segment_ids", "none of them reads"),
}


def run_batch(name: str, culprit: int | None) -> None:
    """The batch on all ranks, or on one while the others have a good one."""
    model = triton_sp.wrap(causal("Llama"))
    bad = culprit is None or dist.get_rank() == culprit
    model(**(BATCHES[name][0]() if bad else {"input_ids": ids(), "labels": ids()}))


@pytest.mark.parametrize("name", BATCHES)
def test_batches(ranks, name: str) -> None:
    _, field, found = BATCHES[name]
    for rank, error in enumerate(errors_of(ranks, run_batch, name, None)):
        assert type(error) is InputError
        assert field in error.field and found in error.found
        assert error.rank == rank


@pytest.mark.parametrize("name", ["use_cache", "holes", "mask_type", "unbatched", "labels_shape"])
def test_one_rank_with_a_bad_batch(ranks, name: str) -> None:
    _, field, found = BATCHES[name]
    others = errors_of(ranks, run_batch, name, 1, size=3)
    culprit = others.pop(1)
    assert type(culprit) is InputError and (culprit.field, culprit.rank) == (field, 1) and found in culprit.found
    for rank, error in zip((0, 2), others, strict=True):
        assert type(error) is DisagreementError and error.rank == rank
        assert "rank 1" in error.found and field in error.found


def run_bad_call() -> None:
    model = triton_sp.wrap(zoo.CASES["vit"].model())
    batch = zoo.CASES["vit"].batch("plain")
    if dist.get_rank() == 1:
        model(batch["pixel_values"], None, None, None, None, None)
    model(**batch)


def test_one_rank_with_a_bad_call(ranks) -> None:
    others = errors_of(ranks, run_bad_call)
    assert type(others[0]) is DisagreementError and "rank 1" in others[0].found
    assert type(others[1]) is InputError and "too many" in others[1].found


def different(what: str) -> None:
    """The same on all ranks but for one thing on the last."""
    case, last = zoo.CASES["llava"], dist.get_rank() == dist.get_world_size() - 1
    model, batch = case.model(), case.batch("right_pad")
    config = SPConfig(gather_logits=last and what == "config")
    model.train(not (last and what == "training"))
    triton_sp.wrap(model, config=config)
    if last and what in ("input_ids", "labels"):
        batch[what] = batch[what].clone()
        batch[what][0, 3] = 17
    if last and what == "pixel_values":
        batch[what] = batch[what][:-1]
    if last and what == "attention_mask":
        del batch[what]
        batch["labels"] = batch["labels"].clamp(min=0)
    if what == "num_items_in_batch":
        batch[what] = torch.tensor(7 + last)
    if last and what == "batch":
        batch = case.batch("plain")
    model(**batch)


DIFFERENCES = [
    "input_ids", "labels", "pixel_values", "attention_mask", "num_items_in_batch", "batch", "config", "training",
]  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ(ranks, what: str) -> None:
    for rank, error in enumerate(errors_of(ranks, different, what, size=3)):
        assert type(error) is DisagreementError and error.rank == rank
        assert what in ("attention_mask", "batch") or error.field == what
        assert "rank 2" in error.found and "rank 0" in error.expected


# --- found during the forward or the backward ----------------------------------------------------------------------


def run_dropout(where: str) -> None:
    case = zoo.CASES["llava"]
    model = case.model()
    part = model.model.vision_tower if where == "tower" else model.model.language_model
    for module in part.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    triton_sp.wrap(model)
    batch = case.batch("plain")
    model.eval()(**batch)
    model.train()(**batch)


@pytest.mark.parametrize("where", ["tower", "decoder"])
def test_attention_dropout(ranks, where: str) -> None:
    for error in errors_of(ranks, run_dropout, where):
        assert type(error) is UnsupportedModelError
        assert "dropout=0.5" in error.found and "dropout" in error.remedy


def run_checkpoint_wrapper(first: bool) -> None:
    case = zoo.CASES["vit"]
    model, batch = case.model(), case.batch("plain")
    blocks = {id(block) for block in model.layers}
    config = SPConfig(plan="heads")
    if not first:
        triton_sp.wrap(model, config=config)
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
    if first:
        triton_sp.wrap(model, config=config)
    tiny.loss_of(model(**batch)).backward()


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_around_tower_blocks(ranks, first: bool) -> None:
    for error in errors_of(ranks, run_checkpoint_wrapper, first):
        assert type(error) is UnsupportedModelError
        assert "checkpoint" in error.found and "gradient_checkpointing_enable" in error.remedy
