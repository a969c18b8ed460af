"""The parts of a model: what `find_parts` finds and the wrappers install themselves on."""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any, Literal

import torch
from torch import nn

from triton_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Spans:
    """Which tokens a composite model lets see one another, in a decoder that is causal otherwise.

    Attributes:
        token_types: neighbouring tokens that have one of these in the argument `types` are a span.
        single: all such tokens of a row see one another, so a row can have one span only.
        cut: whether sliding windows end inside spans too, or only between them.
        required: without token_type_ids the model's mask is not one thing (PaliGemma's sdpa is causal if there is
            padding, and sees everything if not).
        causal_layers: the type of layers that know no spans (Gemma 4), or None.
    """

    token_types: tuple[int, ...]
    single: bool = False
    cut: bool = False
    required: bool = False
    types: str = "token_type_ids"
    causal_layers: str | None = None


@dataclass(eq=False)
class Stack:
    """One list of blocks and the attention modules in it."""

    name: str
    module: nn.Module  # the model whose forward runs the blocks
    blocks: list[nn.Module]
    attention: list[nn.Module]  # one or more a block, in order
    family: str
    by_interface: bool  # attention goes through transformers' attention interface; otherwise it is opaque
    refusal: UnsupportedModelError | None = None
    proven: bool = False  # in the list of those that the tests compare with one process
    outside: list[nn.Module] = field(default_factory=list)  # of a tower, all modules that are in none of its blocks
    side_modules: list[nn.Module] = field(default_factory=list)  # but those in lists, which may run between blocks
    embeddings: nn.Module | None = None  # of a tower, where it interpolates positions by the sizes of all images
    unit: int = 1  # neighbouring tokens that a side module or a merger needs together
    rotaries: list[nn.Module] = field(default_factory=list)  # those whose frequencies depend on the longest position
    recurrent: list[nn.Module] = field(
        default_factory=list
    )  # layers whose tokens meet in a convolution or a recurrence
    learned_positions: nn.Module | None = None  # of a decoder, the table from which each token takes a row
    spans: Spans | None = None  # where the model around a decoder makes its masks
    gathered: list[nn.Module] = field(default_factory=list)  # of a decoder, layers that get the states of all tokens
    why_gathered: str = ""
    tokens_first: bool = False  # hidden states are (N, B, C), as torch's attention has them by default

    @property
    def tried_by_blocks(self) -> bool:
        """Whether the first call of each block is compared with the unsharded block."""
        return not self.by_interface and not self.gathered


@dataclass(frozen=True)
class FeatureMethod:
    """A method of a composite model that turns pixels into the rows which stand for its placeholder tokens.

    Attributes:
        method: its name; its first argument are the pixels.
        token: the attribute of the model's configuration that holds the placeholder's id.
        granularity: where the work may be cut between ranks. "patches": anywhere between merge units; "images":
            between images; "frames": the pixels are videos, and cuts are between frames; "whole": nowhere, every rank
            makes all rows.
        grid: the argument that holds (frames, height, width) of each image in patches, where pixels are packed patches.
        per_sample: an entry of the pixels is a sample's images, filled up with images of zeros.
    """

    method: str
    token: str
    granularity: Literal["patches", "images", "frames", "whole"]
    grid: str | None = None
    per_sample: bool = False


@dataclass(eq=False)
class Fusion:
    """Where a composite model puts visual features between its text: the module whose forward does it, and how.

    Attributes:
        features: empty where the fusion is not known; features and embeddings are whole on every rank then.
        why: the reason why they are not known.
        gathered: with one of these arguments all features and embeddings are whole on every rank.
        makers: the names of parts that make features of each rank's own images only.
        proven: the tests compare such a composite with one process.
    """

    name: str
    module: nn.Module
    features: tuple[FeatureMethod, ...]
    why: str = ""
    proven: bool = False
    gathered: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()

    @property
    def visual_arguments(self) -> set[str]:
        """The names of all arguments of the methods that make features."""
        methods = [getattr(type(self.module), features.method) for features in self.features]
        return {name for method in methods for name in inspect.signature(method).parameters}


@dataclass(eq=False)
class Anatomy:
    """What `find` found in one model.

    Attributes:
        entry: the module whose forward takes the batch.
        unsharded: names of stacks that stay unsharded on purpose, with the reason.
        fusion: None in models without a tower or without a decoder.
    """

    entry: nn.Module
    towers: list[Stack]
    decoder: Stack | None
    unsharded: list[tuple[str, str]]
    fusion: Fusion | None = None

    @property
    def stacks(self) -> list[Stack]:
        """All stacks that are sharded: the towers, then the decoder."""
        return self.towers + ([self.decoder] if self.decoder else [])


def is_hf(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model, without importing transformers for those who do not use it."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def contains(module: nn.Module, part: nn.Module) -> bool:
    """Whether a module is, or holds, another."""
    return any(candidate is part for candidate in module.modules())


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether a module's own forward calls transformers' attention interface. Kosmos-2.5 asks it for an attribute,
    which it does not have, and so always gets a function of its own."""
    function, interface = type(module).forward, "ALL_ATTENTION_FUNCTIONS"
    if not hasattr(module, "config") or interface not in code_names(function):
        return False
    used = [name for kind, name in _loads(inspect.unwrap(function).__code__) if kind == "LOAD_GLOBAL"]
    return ("getattr", interface) not in pairwise(used)


@cache
def _loads(code: CodeType) -> list[tuple[str, Any]]:
    """What code loads, in order. All layers of a kind have the same code, and reading it took 1 ms of each."""
    return [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")]


def code_names(function: Any) -> set[str]:
    """The names of attributes and globals that the code of a function uses; none if it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else set(code.co_names)


def own_code_names(module: nn.Module) -> set[str]:
    """The names that the code of a module's class uses, that of its base classes too, if they are not torch's own."""
    classes = [cls for cls in type(module).__mro__ if cls is not object and not cls.__module__.startswith("torch.")]
    methods = [inspect.unwrap(value) for cls in classes for value in vars(cls).values() if inspect.isfunction(value)]
    return {name for m in methods if m.__name__ != "__init__" for name in code_names(m)}


def takes_positions(decoder: nn.Module) -> bool:
    """Whether a decoder can be told the positions of its tokens. Each forward asks, and Python takes 0.2 ms to look."""
    return "position_ids" in _parameters(type(decoder))


@cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def hands_keywords_on(module: nn.Module) -> bool:
    """Whether the forward of a module makes use of the keywords that it does not name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    keywords = code.co_varnames[named]
    return any(keywords in (names if isinstance(names, tuple) else (names,)) for _, names in _loads(code))


def attention_like(module: nn.Module) -> bool:
    """Whether a module is called attention, which is all that can be known before it runs."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
