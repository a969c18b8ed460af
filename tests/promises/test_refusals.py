"""What cannot be done is said: what was expected, found and the remedy, on every rank, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from kit import tiny, zoo
from kit.refusals import errors_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh

import triton_sp
from triton_sp import SPConfig, errors
from triton_sp.errors import DisagreementError, GroupError, InputError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("started")


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
