"""What a step holds: the largest tensor that it makes, and the bytes that it keeps for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_sp
from triton_sp import families
from triton_sp.testing import saved_activations

TEXT = 60


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returns, and its shape. Views of the batch and
    tensors that are shaped like a weight (gradients) do not count."""

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
            if x.numel() > self.elements and x.untyped_storage().data_ptr() not in self.inputs:
                self.elements, self.shape = x.numel(), tuple(x.shape)
        return out


@dataclass(frozen=True)
class Held:
    """By one rank."""

    loss: float
    largest: int  # elements
    shape: tuple[int, ...]
    saved: int  # bytes


def long_batch(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One row: some text, and an image or images of some hundred features."""
    generator = torch.Generator().manual_seed(0)
    text = zoo.text_row(TEXT, generator)
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 46, 50]])
        patches = int(grid.prod())
        spans = [patches // zoo.MERGE**2]
        inputs = {
            "pixel_values": zoo.pixels(patches, 3 * 2 * zoo.PATCH**2, dtype=dtype),
            "image_grid_thw": grid,
        }
    else:  # images of one tile
        features = zoo.GRID**2 if name == "llava" else zoo.GRID**2 // zoo.MERGE**2
        spans = [features] * 48
        side = zoo.GRID * zoo.PATCH
        inputs = {"pixel_values": zoo.pixels(48, 3, side, side, dtype=dtype)}
    row = list(text)
    for span in spans:
        row += [zoo.VISION_START, *[zoo.IMAGE] * span, zoo.VISION_END]
    batch = zoo.collate([row], None) | inputs
    if name.startswith("qwen"):
        batch["mm_token_type_ids"] = (batch["input_ids"] == zoo.IMAGE).int()
    return batch


def held(name: str, wrapped: bool) -> Held:
    case = zoo.CASES[name]
    model, batch = case.build(torch.float32), long_batch(name, torch.float32)
    if wrapped:
        triton_sp.wrap(model)
    with saved_activations(model) as saved:
        loss = model(**batch).loss  # kept: what is saved is what lives as long as the loss
    with Largest(model, batch) as largest:
        model(**batch).loss.backward()
    return Held(float(loss.detach()), largest.elements, largest.shape, saved[0])


def held_gathered(name: str) -> Held:
    """With a seam that is not known."""
    with mock.patch.dict(families.SEAMS, clear=True):
        return held(name, True)
