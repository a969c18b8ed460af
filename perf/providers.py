"""The models of perf/exchange.py and who runs them: one process, this library, DeepSpeed."""

from __future__ import annotations

import functools
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
from triton_sp import comm
from triton_sp.plan import shard_tokens

ONE, OURS, DEEPSPEED = "one process", "triton_sp", "DeepSpeed"
LAYERS, SIDE, LENGTH, WIDTH, VOCAB = 2, 48, 2048, 256, 512


# --- the models --------------------------------------------------------------------------------------------------


def build_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        image_size=SIDE * 4, patch_size=4, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.SiglipVisionModel._from_config(config, attn_implementation="sdpa")
    return model.train(), {"pixel_values": torch.randn(1, 3, SIDE * 4, SIDE * 4)}


def build_llm() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCAB, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    return model.train(), {"input_ids": ids, "position_ids": torch.arange(LENGTH)[None], "labels": ids}


MODELS = {"ViT": (build_vit, SIDE**2), "LLM": (build_llm, LENGTH)}


def vit_loss(hidden: Tensor, own: slice) -> Tensor:
    """The share of some tokens in a fixed random projection of the tower's output."""
    weights = torch.randn(SIDE**2, WIDTH, generator=torch.Generator().manual_seed(1))
    return (hidden * weights[own]).sum() / SIDE**2


# --- the providers -----------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A model as one provider runs it.

    Attributes:
        forward: the loss, or this rank's share of it.
        around: what has to be in place while it runs.
        combine: makes the gradients those of the whole batch, after the step, and outside of what is counted and timed:
            engines do it, and it is the same for all.
        shared: whether `forward` gives a share.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    combine: Callable[[nn.Module], None]
    around: Callable[[], Any] = nullcontext
    shared: bool = False


def plain(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    if name == "LLM":
        return lambda: model(**batch).loss
    return lambda: vit_loss(model(**batch).last_hidden_state[0], slice(None))


def add_gradients(model: nn.Module) -> None:
    comm.all_reduce_gradients(list(model.parameters()), comm.resolve_group(), 1.0)


@contextmanager
def attention_by(function: Callable[..., Any]) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def deepspeed(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Runner:
    import deepspeed.comm

    # Without its C++ extensions, which it would compile: what is compared here uses none.
    with mock.patch.dict(deepspeed.ops.__compatible_ops__, clear=True):
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    share = shard_tokens(MODELS[name][1], dist.get_world_size()).range(dist.get_rank())
    own = slice(share.start, share.stop)
    if name == "ViT":
        from deepspeed.sequence.autosp_vit import UlyssesSPViTAttention

        for layer in model.encoder.layers:
            layer.self_attn = UlyssesSPViTAttention(layer.self_attn, dist.group.WORLD, has_cls_token=False)
        # Each rank is to feed its blocks its part of the patches.
        model.embeddings.register_forward_hook(lambda _, inputs, hidden: hidden[:, own])
        return Runner(model, lambda: vit_loss(model(**batch).last_hidden_state[0], own), add_gradients, shared=True)

    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size(), 1)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    del ALL_ATTENTION_FUNCTIONS["sdpa"]  # it stands there for every model of the process
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)[0, own]  # shifted before they are cut

    def forward() -> Tensor:
        logits = model(input_ids=batch["input_ids"][:, own], position_ids=batch["position_ids"][:, own]).logits[0]
        return F.cross_entropy(logits, targets, reduction="sum") / (LENGTH - 1)

    around = functools.partial(attention_by, attention)
    return Runner(model, forward, add_gradients, around, shared=True)


def prepare(provider: str, name: str) -> Runner:
    model, batch = MODELS[name][0]()
    if provider == DEEPSPEED:
        return deepspeed(name, model, batch)
    if provider == OURS:
        triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads"))
        return Runner(model, plain(name, model, batch), triton_sp.sync_gradients)
    return Runner(model, plain(name, model, batch), lambda model: None)
