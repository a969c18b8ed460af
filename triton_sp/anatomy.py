"""The parts of a model: what `models.find` finds and the wrappers install themselves on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from triton_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Spans:
    """Which tokens a composite model lets see one another, in a decoder that is causal otherwise.

    Attributes:
        token_type: neighbouring tokens that have this in `token_type_ids` are a span.
        single: all such tokens of a row see one another, so a row can have one span only.
        cut: whether sliding windows end inside spans too, or only between them.
        required: without token_type_ids the model's mask is not one thing (PaliGemma's sdpa is causal if there is
            padding, and sees everything if not).
    """

    token_type: int
    single: bool
    cut: bool
    required: bool


@dataclass(eq=False)
class Stack:
    """One list of blocks and the attention modules in it."""

    name: str
    module: nn.Module  # the model whose forward runs the blocks
    blocks: list[nn.Module]
    attention: list[nn.Module]  # one or more a block, in order
    family: str
    door: bool  # attention goes through transformers' attention interface; otherwise it is opaque
    refusal: UnsupportedModelError | None = None
    known: bool = False
    taps: list[nn.Module] = field(default_factory=list)
    embeddings: nn.Module | None = None  # of a tower, where it interpolates positions by the sizes of all images
    unit: int = 1  # neighbouring tokens that a tap or merger needs together
    rotaries: list[nn.Module] = field(default_factory=list)  # those whose frequencies depend on the longest position
    spans: Spans | None = None  # where the model around a decoder makes its masks
    tokens_first: bool = False  # hidden states are (N, B, C), as torch's attention has them by default


@dataclass(frozen=True)
class Features:
    """A method of a composite model that turns pixels into the rows which stand for its placeholder tokens.

    Attributes:
        method: its name; its first argument are the pixels.
        token: the attribute of the model's configuration that holds the placeholder's id.
        cut: how ranks share the work out. "patches": anywhere between merge units; "images": ranks have whole ones;
            "frames": pixels are videos, and ranks have whole frames.
        beside: with patches the argument with the grid of each image; with images arguments with an entry for each too.
        samples: an entry of the pixels is a sample's images, filled up with images of zeros.
    """

    method: str
    token: str
    cut: Literal["patches", "images", "frames"]
    beside: tuple[str, ...] = ()
    samples: bool = False


@dataclass(eq=False)
class Seam:
    """Where a composite model puts visual features between its text: the module whose forward does it, and how.

    Attributes:
        features: empty where the seam is not known; features and embeddings are whole on every rank then.
        why: the reason for either.
    """

    name: str
    module: nn.Module
    features: tuple[Features, ...]
    why: str

    @property
    def visual_arguments(self) -> set[str]:
        """The names of all that the methods take which make features."""
        methods = [getattr(type(self.module), features.method) for features in self.features]
        return {name for method in methods for name in inspect.signature(method).parameters}


@dataclass(eq=False)
class Anatomy:
    """What `find` found in one model.

    Attributes:
        entry: the module whose forward takes the batch.
        whole: names of stacks that stay unsharded on purpose, with the reason.
        seam: None in models without a tower or without a decoder.
    """

    entry: nn.Module
    towers: list[Stack]
    decoder: Stack | None
    whole: list[tuple[str, str]]
    seam: Seam | None = None

    @property
    def stacks(self) -> list[Stack]:
        return self.towers + ([self.decoder] if self.decoder else [])


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits that its head gives: a scale, then a soft limit.

    >>> LogitTransform(scale=2.0, softcap=3.0)(torch.tensor([0.0, 100.0])).tolist()
    [0.0, 3.0]
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def is_hf(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model, without importing transformers for those who do not use it."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def uses_door(module: nn.Module) -> bool:
    """Whether a module's own forward calls transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return hasattr(module, "config") and code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_like(module: nn.Module) -> bool:
    """Whether a module is called attention, which is all that can be known before it runs."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
