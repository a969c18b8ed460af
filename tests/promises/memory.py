"""What a step holds: the largest tensor that it makes, and the bytes that it keeps for the backward."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from kit import tiny, zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_sp
from triton_sp.anatomy import find
from triton_sp.anatomy.fusion import find_fusion
from triton_sp.anatomy.parts import Fusion
from triton_sp.testing import saved_activations

REPEATED = 16  # a number that 4 ranks share evenly


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returns, and its shape. Views of the batch and
    tensors that are shaped like a weight (gradients) do not count, nor do masks and scores (S, S), which only one
    process has."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = {tuple(p.shape) for p in model.parameters()}
        self.inputs = {x.untyped_storage().data_ptr() for x in batch.values()}
        self.elements, self.shape = 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape) in self.weights:
                continue
            square = x.ndim > 1 and x.shape[-1] == x.shape[-2] > REPEATED
            if x.numel() > self.elements and not square and x.untyped_storage().data_ptr() not in self.inputs:
                self.elements, self.shape = x.numel(), tuple(x.shape)
        return out


class Peak(TorchDispatchMode):
    """The most bytes of tensors that live at one time, of those that operations return in this block."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and "_wrap_tensor_autograd" not in func.name():  # of what has been counted
                self._count(x.untyped_storage(), before)
        return out

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = id(storage)
        if storage.data_ptr() in before or key in self.live:  # a view, or written in place
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.bytes = max(self.bytes, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@dataclass(frozen=True)
class Held:
    """By one rank."""

    loss: float
    largest: int  # elements
    shape: tuple[int, ...]
    saved: int  # bytes


TOKENS = ("input_ids", "labels", "mm_token_type_ids")


def long_batch(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One row: the family's image of the parity suite and its text, `REPEATED` times; where images are of any size, all
    of it is one image behind the text."""
    case = zoo.CASES[name]
    once = case.batch("plain", dtype)

    def repeated(dtype: torch.dtype) -> dict[str, Tensor]:
        # Idefics' and SmolVLM's pictures are (B, most of a sample, ...).
        along = {key: int(key in TOKENS or "pixel_attention_mask" in once) for key in once}
        batch = {key: torch.cat([x] * REPEATED, along[key]) for key, x in once.items() if key != "token_type_ids"}
        if "image_grid_thw" in batch:
            batch["image_grid_thw"] = once["image_grid_thw"] * torch.tensor([1, REPEATED, 1])
            order = (batch["input_ids"] == tiny.IMAGE).int().argsort(dim=1, stable=True)
            batch |= {key: batch[key].gather(1, order) for key in TOKENS}
        return batch

    return zoo.marked(repeated, "paligemma" in name, dtype) if "token_type_ids" in once else repeated(dtype)


def held(name: str, wrapped: bool) -> Held:
    case = zoo.CASES[name]
    model, batch = case.model(torch.float32), long_batch(name, torch.float32)
    if wrapped:
        triton_sp.wrap(model)
    with saved_activations(model) as saved:
        loss = model(**batch).loss  # kept: what is saved is what lives as long as the loss
    with Largest(model, batch) as largest:
        model(**batch).loss.backward()
    return Held(float(loss.detach()), largest.elements, largest.shape, saved[0])


def held_gathered(name: str) -> Held:
    """With a fusion that is not known."""

    def unknown(*found: Any) -> Fusion:
        return replace(find_fusion(*found), features=())

    with mock.patch.object(find, "find_fusion", unknown):
        return held(name, True)


def prefill_peak(name: str, wrapped: bool) -> tuple[int, int]:
    """The most bytes that live while a prompt runs, beside its key/value cache; and those of the cache."""
    prompt = {key: value for key, value in long_batch(name, torch.float32).items() if key != "labels"}
    return _prefill_peak(zoo.CASES[name].model(torch.float32), prompt, wrapped)


def usual_prefill_peak(wrapped: bool) -> tuple[int, int]:
    """The same in the proportions of most models: MLPs of 3.6 times the width, four query heads to a key/value head."""
    config = tiny.text_config("Llama", intermediate_size=344, kv_heads=3, max_position_embeddings=1024)
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, 1020), generator=torch.Generator().manual_seed(1))
    return _prefill_peak(tiny.build("LlamaForCausalLM", config, "sdpa", torch.float32), {"input_ids": ids}, wrapped)


def _prefill_peak(model: Any, prompt: dict[str, Tensor], wrapped: bool) -> tuple[int, int]:
    if wrapped:
        triton_sp.wrap(model, config=triton_sp.SPConfig(shard_prefill=True))
    options = {"max_new_tokens": 1, "do_sample": False, "use_cache": True, "return_dict_in_generate": True}
    with torch.no_grad(), Peak() as peak:
        out = model.generate(**prompt, **options)
    layers = (getattr(out, "cache", None) or out.past_key_values).layers  # the second before transformers 5.24
    cache = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    return peak.bytes - cache, cache
