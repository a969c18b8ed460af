"""Small models with real architectures, and who runs them on several ranks: one process, this library, DeepSpeed.

DeepSpeed is used as its own tests use it: towers by `UlyssesSPViTAttention` (AutoSP), each rank fed its part of the
patches; language models by `UlyssesSPAttentionHF` (ALST), each rank fed its part of the ids with their positions. A
vision-language model is handed to its `auto_wrap_model_for_sp` and fed the whole batch, since nothing slices it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import triton_sp
from triton_sp.plan.shards import shard_tokens
from triton_sp.ranks import collectives, groups

ONE, OURS, AUTOSP, ALST = "one process", "triton_sp", "DeepSpeed AutoSP", "DeepSpeed ALST"
LAYERS, WIDTH, HEADS, KV_HEADS, VOCAB, IMAGE = 2, 256, 8, 4, 512, 1
Batch = dict[str, Tensor]


# --- the models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Patches a side of the image, and ids of the text."""

    side: int = 48
    length: int = 2048

    @property
    def patches(self) -> int:
        return self.side**2


QUICK = Size(8, 96)


def _siglip(size: Size) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=size.side * 4, patch_size=4, vision_use_head=False,
    )  # fmt: skip


def _llama(tokens: int) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip


def build_vit(size: Size) -> tuple[nn.Module, Batch]:
    """A SigLIP tower on one image."""
    torch.manual_seed(0)
    model = hf.SiglipVisionModel._from_config(_siglip(size), attn_implementation="sdpa")
    return model.train(), {"pixel_values": torch.randn(1, 3, size.side * 4, size.side * 4)}


def build_llm(size: Size) -> tuple[nn.Module, Batch]:
    """A Llama on one document."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM._from_config(_llama(size.length), attn_implementation="sdpa")
    ids = torch.randint(2, VOCAB, (1, size.length))
    return model.train(), {"input_ids": ids, "position_ids": torch.arange(size.length)[None], "labels": ids}


def build_vlm(size: Size) -> tuple[nn.Module, Batch]:
    """A LLaVA of both, on one image in the middle of half the text."""
    torch.manual_seed(0)
    text = size.length // 2
    config = hf.LlavaConfig(
        vision_config=_siglip(size), text_config=_llama(size.patches + text), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    words = torch.randint(2, VOCAB, (1, text))
    ids = torch.cat([words[:, : text // 2], torch.full((1, size.patches), IMAGE), words[:, text // 2 :]], 1)
    pixels = torch.randn(1, 3, size.side * 4, size.side * 4)
    labels = ids.masked_fill(ids == IMAGE, -100)
    return model.train(), {"input_ids": ids, "labels": labels, "pixel_values": pixels}


BUILDERS = {"SigLIP ViT": build_vit, "Llama LLM": build_llm, "LLaVA VLM": build_vlm}


def tokens_of(name: str, size: Size) -> int:
    """Of the longest stream of a model."""
    return {"SigLIP ViT": size.patches, "Llama LLM": size.length}.get(name, size.patches + size.length // 2)


# --- the engines -------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A model as one engine runs it.

    Attributes:
        forward: the loss, or this rank's share of it.
        combine: makes the gradients those of the whole batch, after the step, and outside of what is counted and timed:
            training engines do it, and it is the same for all.
        around: what has to be in place while it runs.
        shared: whether `forward` gives a share.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    combine: Callable[[nn.Module], None]
    around: Callable[[], Any] = nullcontext
    shared: bool = False


def plain(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """The model's loss; of a tower, a fixed random projection of its output."""
    if "labels" in batch:
        return lambda: model(**batch).loss
    return lambda: projection(model(**batch).last_hidden_state[0])


def projection(hidden_TC: Tensor, first: int = 0, total: int | None = None) -> Tensor:
    """A loss of a tower's output, or the share in it of the tokens from `first` on."""
    total = len(hidden_TC) if total is None else total
    weights = torch.randn(total, hidden_TC.shape[1], generator=torch.Generator().manual_seed(1))
    return (hidden_TC * weights[first : first + len(hidden_TC)]).sum() / total


def add_gradients(model: nn.Module) -> None:
    collectives.all_reduce_gradients(list(model.parameters()), groups.resolve_group(), 1.0)


def one_process(name: str, size: Size) -> Runner:
    model, batch = BUILDERS[name](size)
    return Runner(model, plain(model, batch), lambda model: None)


def ours(name: str, size: Size) -> Runner:
    model, batch = BUILDERS[name](size)
    triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads"))
    return Runner(model, plain(model, batch), triton_sp.sync_gradients)


def start_deepspeed() -> None:
    """DeepSpeed over gloo, as one rank of the group that is there."""
    import deepspeed.comm

    # Without its C++ extensions, which it would compile: what is compared here uses none.
    with mock.patch.dict(deepspeed.ops.__compatible_ops__, clear=True):
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)


def autosp(name: str, size: Size) -> Runner:
    start_deepspeed()
    from deepspeed.sequence.auto_sp import auto_wrap_model_for_sp

    model, batch = BUILDERS[name](size)
    auto_wrap_model_for_sp(model, dist.group.WORLD)
    if name == "LLaVA VLM":
        mean = functools.partial(
            collectives.all_reduce_gradients, group=groups.resolve_group(), scale=1 / dist.get_world_size()
        )
        return Runner(model, plain(model, batch), lambda model: mean(list(model.parameters())))
    share = shard_tokens(size.patches, dist.get_world_size()).range(dist.get_rank())
    # Each rank is to feed its blocks its part of the patches.
    model.embeddings.register_forward_hook(lambda _, inputs, hidden: hidden[:, share.start : share.stop])

    def forward() -> Tensor:
        return projection(model(**batch).last_hidden_state[0], share.start, size.patches)

    return Runner(model, forward, add_gradients, shared=True)


@contextmanager
def _attention_by(function: Callable[..., Any]) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def alst(name: str, size: Size) -> Runner:
    start_deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    model, batch = BUILDERS[name](size)
    share = shard_tokens(size.length, dist.get_world_size()).range(dist.get_rank())
    own = slice(share.start, share.stop)
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size(), 1)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    del ALL_ATTENTION_FUNCTIONS["sdpa"]  # it stands there for every model of the process
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)[0, own]  # shifted before they are cut

    def forward() -> Tensor:
        logits = model(input_ids=batch["input_ids"][:, own], position_ids=batch["position_ids"][:, own]).logits[0]
        return F.cross_entropy(logits, targets, reduction="sum") / (size.length - 1)

    return Runner(model, forward, add_gradients, functools.partial(_attention_by, attention), shared=True)


@dataclass(frozen=True)
class Engine:
    """Who runs a model on several ranks, and which models."""

    name: str
    prepare: Callable[[str, Size], Runner]
    models: tuple[str, ...] = tuple(BUILDERS)
    package: str = "triton_sp"

    @property
    def absent(self) -> bool:
        return importlib.util.find_spec(self.package) is None


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(ONE, one_process),
        Engine(OURS, ours),
        Engine(AUTOSP, autosp, ("SigLIP ViT", "LLaVA VLM"), "deepspeed"),
        Engine(ALST, alst, ("Llama LLM",), "deepspeed"),
    )
}
