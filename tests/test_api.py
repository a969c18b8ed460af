"""The contract of wrap and unwrap: what stays as it was, what can be done to a wrapped model, which groups work."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from kit.parity import wrap
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh

import triton_sp
from triton_sp.errors import SPError, UnsupportedModelError
from triton_sp.ranks import groups
from triton_sp.testing import RankError

FROZEN = json.loads((Path(__file__).parent / "data" / "state_dict_keys.json").read_text())
VARIED = ["qwen2_5_vl", "llava", "vit", "llama"]


# --- nothing changes but the forward -------------------------------------------------------------------------------


def names_before_and_after(name: str) -> None:
    model = zoo.CASES[name].model()
    parameters = list(dict(model.named_parameters()))
    classes = [type(module) for module in model.modules()]
    assert sorted(model.state_dict()) == FROZEN[name]
    wrap(model)
    for _ in range(2):  # before the first forward, and after it
        assert sorted(model.state_dict()) == FROZEN[name]
        assert list(dict(model.named_parameters())) == parameters
        assert [type(module) for module in model.modules()] == classes
        parity.step(model, zoo.CASES[name].batch())


@pytest.mark.parametrize("name", FROZEN)
def test_names_are_frozen(ranks, name: str) -> None:
    ranks.run(names_before_and_after, name, ranks=2)


def wrap_and_unwrap(name: str) -> None:
    model, batch = zoo.CASES[name].model(), zoo.CASES[name].batch()
    expected = parity.step(model, batch)
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    assert wrap(model) is model
    parity.step(model, batch)
    assert triton_sp.unwrap(model) is model
    for path, module in model.named_modules():
        assert module.__dict__.keys() == attributes[path].keys(), path
        assert "forward" not in module.__dict__, path
        assert module.__dict__.get("config") is attributes[path].get("config"), path
    parity.assert_close(parity.step(model, batch), expected, 0.0)
    assert triton_sp.unwrap(model) is model
    parity.assert_close(parity.step(wrap(model), batch), expected, 1e-5)


@pytest.mark.parametrize("name", VARIED)
def test_unwrap_restores(ranks, name: str) -> None:
    ranks.run(wrap_and_unwrap, name, ranks=2)


def wrap_twice() -> None:
    model = wrap(zoo.CASES["llama"].model())
    forwards = {path: module.forward for path, module in model.named_modules()}
    assert wrap(model) is model
    assert wrap(model, dist.group.WORLD) is model
    assert all(module.forward is forwards[path] for path, module in model.named_modules() if "forward" in vars(module))


def two_models_of_one_config() -> None:
    batch, config = zoo.CASES["llava"].batch(), zoo.CASES["llava"].model().config
    model, other = (type(zoo.CASES["llava"].model())(config).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    expected = parity.step(other, batch)
    wrap(model)
    parity.assert_close(parity.step(other, batch), expected, 0.0)
    parity.assert_close(parity.step(model, batch), expected, 1e-5)
    parity.assert_close(parity.step(other, batch), expected, 0.0)


def inner_modules_run_plain() -> None:
    model, batch = zoo.CASES["llava"].model(), zoo.CASES["llava"].batch()
    embeds = torch.ones(1, 5, tiny.WIDTH, dtype=torch.float64)

    def inner() -> list[Tensor]:
        tower = model.model.vision_tower
        return [
            tower(batch["pixel_values"]).last_hidden_state,
            tower.encoder.layers[0](embeds[..., :48], None),
            model.model.language_model(inputs_embeds=embeds).last_hidden_state,
            model.model.get_image_features(batch["pixel_values"]).pooler_output[0],
        ]

    expected = inner()
    wrap(model)
    if dist.get_rank() == 0:  # each rank by itself: nothing waits for the others
        with torch.no_grad():
            assert all(torch.equal(x, y) for x, y in zip(inner(), expected, strict=True))
        model.eval()
        assert all(torch.equal(x, y) for x, y in zip(inner(), expected, strict=True))


def inner_modules_refuse_training() -> None:
    """They would train unsharded, and nobody would know."""
    model, batch = wrap(zoo.CASES["llava"].model()), zoo.CASES["llava"].batch()
    embeds, inner = torch.ones(1, 5, tiny.WIDTH, dtype=torch.float64), model.model
    batch.pop("labels")
    calls = {
        "LlavaModel.forward": lambda: model.base_model(**batch),
        "LlamaModel.forward": lambda: inner.language_model(inputs_embeds=embeds),
        "CLIPVisionModel.forward": lambda: inner.vision_tower(batch["pixel_values"]),
        "CLIPEncoderLayer.forward": lambda: inner.vision_tower.encoder.layers[0](embeds[..., :48], None),
        "LlavaModel.get_image_features": lambda: inner.get_image_features(batch["pixel_values"]),
    }
    for field, call in calls.items():
        with pytest.raises(UnsupportedModelError, match="call the wrapped LlavaForConditionalGeneration") as caught:
            call()
        assert caught.value.field == field


def covered(first: bool) -> None:
    """A forward of a trainer's own, which calls the base model past ours: put there before wrap, or after it."""
    model, batch = zoo.CASES["llama"].model(), zoo.CASES["llama"].batch()

    def fused(self: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        return self.base_model(**kwargs).last_hidden_state[:, :-1][labels[:, 1:] != -100] if fused_lm_head else None

    if not first:
        wrap(model)
    model.forward = MethodType(fused, model)
    if first:
        wrap(model)
    model(**batch, fused_lm_head=True)


@pytest.mark.parametrize(("first", "found"), [(False, "covered.*fused stands in front"), (True, "fused_lm_head")])
def test_covered_forward(ranks, first: bool, found: str) -> None:
    with pytest.raises(RankError, match=found) as caught:
        ranks.run(covered, first, ranks=2)
    assert all(isinstance(error, SPError) for error in caught.value.errors.values()) and len(caught.value.errors) == 2


@pytest.mark.parametrize(
    "job", [wrap_twice, two_models_of_one_config, inner_modules_run_plain, inner_modules_refuse_training]
)
def test_others_stay_as_they_are(ranks, job: Callable[[], None]) -> None:
    ranks.run(job, ranks=2)


def one_rank_is_bitwise(name: str) -> None:
    model = zoo.CASES[name].model()
    for batch in zoo.CASES[name].batches:
        expected = parity.step(triton_sp.unwrap(model), zoo.CASES[name].batch(batch))
        parity.assert_close(parity.step(wrap(model), zoo.CASES[name].batch(batch)), expected, 0.0)


@pytest.mark.parametrize("name", [*VARIED, "qwen3_vl", "dinov2", "phi3_longrope"])
def test_one_rank_is_bitwise(ranks, name: str) -> None:
    ranks.run(one_rank_is_bitwise, name, ranks=1)


# --- what can be done to a wrapped model ---------------------------------------------------------------------------


def copies(name: str) -> None:
    model, batch = zoo.CASES[name].model(), zoo.CASES[name].batch()
    expected = parity.step(copy.deepcopy(model), batch)
    wrap(model)
    early = copy.deepcopy(model)
    buffer = io.BytesIO()  # before the first forward: transformers puts hooks into LLaVA then that do not pickle
    torch.save(model, buffer)
    buffer.seek(0)
    parity.assert_close(parity.step(model, batch), expected, 1e-5)
    late = copy.deepcopy(model)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (early, late, loaded):
        parity.assert_close(parity.step(twin, batch), expected, 1e-5)
    triton_sp.unwrap(late)
    parity.assert_close(parity.step(late, batch), expected, 0.0)
    parity.assert_close(parity.step(model, batch), expected, 1e-5)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in early.parameters()}
    assert not shared


@pytest.mark.parametrize("name", VARIED)
def test_copy_and_pickle(ranks, name: str) -> None:
    ranks.run(copies, name, ranks=2)


def saved_config(folder: str) -> None:
    model = zoo.CASES["llava"].model()
    files = []
    for state in ("plain", "wrapped"):
        target = Path(folder) / state
        model.save_pretrained(target)
        if dist.get_rank() == 0:  # the one that transformers lets write
            files.append({file.name: file.read_bytes() for file in target.iterdir()})
        wrap(model)
    if dist.get_rank():
        return
    assert files[0] == files[1]
    assert b"triton_sp" not in files[1]["config.json"]


def test_save_pretrained(ranks, tmp_path: Path) -> None:
    ranks.run(saved_config, str(tmp_path), ranks=2)


def generation(name: str) -> None:
    """By one rank alone, for which no other waits; then by all of them."""
    model = zoo.CASES[name].model()
    batch = {key: value for key, value in zoo.CASES[name].batch().items() if key != "labels"}
    cached, plain = ({"max_new_tokens": 5, "do_sample": False, "use_cache": cache} for cache in (True, False))
    expected = model.generate(**batch, **cached)
    wrap(model)
    if dist.get_rank() == 0:
        for options in (cached, plain):
            assert torch.equal(model.generate(**batch, **options), expected)
    model.generation_config.use_cache = model.config.use_cache = False  # as scripts that train often have it
    for mode in (True, False):
        assert torch.equal(model.train(mode).generate(**batch, max_new_tokens=5, do_sample=False), expected)
    with torch.no_grad():  # evaluation, which comes with no cache either, is sharded
        tokens = model(**batch).logits.shape[1]
    assert tokens < batch["input_ids"].numel()
    parity.step(model.train(), zoo.CASES[name].batch())
    assert "generate" not in vars(triton_sp.unwrap(model))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "llama"])
def test_generate(ranks, name: str) -> None:
    ranks.run(generation, name, ranks=2)


# --- groups --------------------------------------------------------------------------------------------------------


class Mpu:
    """What Megatron and DeepSpeed hand around."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.group


def data_and_sequence_parallel(how: str) -> None:
    """2 x 2: each pair of ranks shares a batch of its own."""
    pair = dist.get_rank() // 2
    if how == "mesh":
        group: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    elif how == "axis":
        group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "context"))["context"]
    else:
        own = [dist.new_group([0, 1]), dist.new_group([2, 3])][pair]
        group = Mpu(own) if how == "mpu" else own
    model, batch = zoo.CASES["llava"].model(), zoo.CASES["llava"].batch(["plain", "right_pad"][pair])
    expected = parity.step(copy.deepcopy(model), batch)
    own = groups.resolve_group(group).process_group
    parity.assert_close(parity.step(wrap(model, group), batch, own), expected, 1e-5)


@pytest.mark.parametrize("how", ["mesh", "axis", "mpu", "group"])
def test_groups(ranks, how: str) -> None:
    ranks.run(data_and_sequence_parallel, how, ranks=4)


# --- checkpointing from outside ------------------------------------------------------------------------------------


def checkpointed_decoder(first: bool) -> None:
    """torch's checkpoint_wrapper around decoder layers, put on before wrap or after; the tower has none."""
    model, batch = zoo.CASES["llava"].model(), zoo.CASES["llava"].batch("right_pad")
    expected = parity.step(copy.deepcopy(model), batch)
    layers = {id(layer) for layer in model.model.language_model.layers}
    for step in ("checkpoint", "wrap") if first else ("wrap", "checkpoint"):
        if step == "wrap":
            wrap(model)
        else:
            apply_activation_checkpointing(model, check_fn=lambda module: id(module) in layers)
    loss, grads = parity.step(model, batch)
    plain = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}
    parity.assert_close((loss, plain), expected, 1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_around_decoder_layers(ranks, first: bool) -> None:
    ranks.run(checkpointed_decoder, first, ranks=2)
