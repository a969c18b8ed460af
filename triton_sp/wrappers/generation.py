"""`generate` of a wrapped model: its calls of the model's forward are told from those of training and evaluation.

By default each rank generates by itself, unsharded, so that one may do so alone. With `SPConfig(shard_prefill=True)`
the ranks of a group generate together: the prompt runs sharded like a batch of training, while every layer's keys and
values are gathered into the key/value cache of each rank. The steps after it, of one token each, run on each rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from triton_sp import stages
from triton_sp.anatomy.parts import Anatomy
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.ranks import collectives
from triton_sp.wrappers.inputs.batch import CACHES, Batch
from triton_sp.wrappers.inputs.described import prepare_on_all
from triton_sp.wrappers.inputs.layout import TextCall, gather_tokens
from triton_sp.wrappers.install import Installation, Override, replaced
from triton_sp.wrappers.scope import Call, active

_ALONE = "leave out SPConfig(shard_prefill=True): each rank prefills by itself then"
_ENCODE = "_maybe_prepare_encoder_kwargs_for_generation"
_generating: ContextVar[bool] = ContextVar("triton_sp_generating", default=False)


def install(installation: Installation) -> None:
    """Override the `generate` of a model that has one."""
    if hasattr(installation.anatomy.entry, "generate"):
        installation.override(installation.anatomy.entry, _run_generate, "generate")


def generating() -> bool:
    """Whether this runs inside a `generate`, whatever cache it uses, or none."""
    return _generating.get()


@contextmanager
def _in_generation() -> Iterator[None]:
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)


def _run_generate(override: Override, *args: Any, **kwargs: Any) -> Any:
    installation, entry = override.installation, override.module
    encode: Callable[..., Any] | None = getattr(entry, _ENCODE, None)
    with _in_generation(), ExitStack() as stack:
        if encode is not None and shares(installation):
            stack.enter_context(replaced(entry, _ENCODE, partial(_encode, installation, encode)))
        return override.original(*args, **kwargs)


def _encode(installation: Installation, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """From transformers 5.24 on, `generate` makes the features before the prompt. They are left to the prompt, where no
    rank has all of them. Where they are needed several times (beams, no cache), they are made once, by sharded blocks,
    and are whole on each rank."""
    arguments = inspect.signature(encode).bind(*args, **kwargs).arguments
    given, options = arguments["model_kwargs"], arguments["generation_config"]
    if options.use_cache and (options.num_beams or 1) * (options.num_return_sequences or 1) == 1:
        return given
    prepare_on_all(installation, given, lambda: None)
    with active(Call()):
        return encode(*args, **kwargs)


def obstacle(anatomy: Anatomy) -> str:
    """Why a model's prompt cannot be sharded, or nothing."""
    decoder = anatomy.decoder
    if decoder is None or not hasattr(anatomy.entry, "generate"):
        return "it does not generate"
    if decoder.gathered:
        return "layers that get the hidden states of all tokens keep what they will"
    return "recurrent layers keep states, which are not gathered" if decoder.recurrent else ""


def describe_prefill(installation: Installation | None) -> str:
    """How a prompt is prefilled, in words for `explain`; empty where nothing is wrapped or generated."""
    if installation is None or installation.idle:
        return ""
    if installation.anatomy.decoder is None or not hasattr(installation.anatomy.entry, "generate"):
        return ""
    if not installation.config.shard_prefill:
        return "each rank by itself, unsharded; ranks may generate alone"
    reason = obstacle(installation.anatomy)
    if reason:
        return f"each rank by itself, unsharded: {reason}"
    return "all ranks together, sharded; keys and values are whole on each rank then, and each token after it unsharded"


def shares(installation: Installation) -> bool:
    """Whether the ranks generate together."""
    return installation.config.shard_prefill and not obstacle(installation.anatomy)


def prefills(installation: Installation, arguments: dict[str, Any]) -> bool:
    """Whether a call of `generate` is to run sharded: with an empty cache, or on whole sequences."""
    cache = _cache(arguments)
    return shares(installation) and (cache is None or not cache.get_seq_length())


def _cache(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a call of `generate` asks for.

    Attributes:
        cache: of transformers and empty, to be filled; None on whole sequences without a cache.
        keep: the logits of so many tokens at the end of each row; 0 asks for those of all.
    """

    cache: Any
    keep: int

    @classmethod
    def take(cls, arguments: dict[str, Any], anatomy: Anatomy) -> Prompt:
        """From the arguments of a call, of which what is told here is taken away."""
        cache, keep = _cache(arguments), arguments.get("logits_to_keep")
        if cache is None and arguments.get("use_cache"):  # Phi-3, where the prompt changes its rotary tables
            from transformers import DynamicCache

            assert anatomy.decoder is not None
            cache = DynamicCache(config=anatomy.decoder.module.config)  # type: ignore[arg-type]
        if not isinstance(keep, Tensor):
            arguments.pop("logits_to_keep", None)
        for name in ("use_cache", *CACHES):
            arguments.pop(name, None)
        return cls(cache, 0 if isinstance(keep, Tensor) else keep or 0)

    def of(self, batch: Batch) -> Batch:
        """The batch as a model reads it that fills a cache: positions tell it of no packed documents then.

        Raises:
            InputError: the last tokens of a row are padding, of which no logits are formed.
        """
        if batch.mask is not None and self.keep and not bool(batch.mask[:, -self.keep :].all()):
            raise InputError(
                "attention_mask",
                expected="a prompt that is padded on the left: its next token is predicted by the last",
                found=f"padding among the last {self.keep} tokens of a row",
                remedy=f"padding_side='left', or {_ALONE}",
            )
        return batch if self.cache is None else replace(batch, documents=None)


def prefill(override: Override, inputs: dict[str, Any], call: TextCall, prompt: Prompt) -> Any:
    """Run a prompt sharded, and return what the model would have: the logits that are asked for, and the whole cache.

    Args:
        inputs: what the model's own forward gets, as in training.
    """
    installation, stream = override.installation, call.stream
    collected = None if prompt.cache is None else _CollectedCache(prompt.cache, call, installation)
    if collected is not None:
        name = next(name for name in CACHES if name in override.__signature__.parameters)
        inputs = inputs | {name: collected, "use_cache": True}
    kept = (call.index % call.shape[1] >= call.shape[1] - prompt.keep).cpu()
    if prompt.keep:
        inputs = inputs | {"logits_to_keep": kept[stream.local].nonzero().flatten().to(call.index.device)}
    with active(call):
        out = override.original(**inputs, return_dict=True)
    fields: dict[str, Any] = {name: value for name, value in out.items() if value is not None}
    fields |= {name: prompt.cache for name, value in fields.items() if value is collected}
    if prompt.keep:
        sizes = [int(kept[part.start : part.stop].sum()) for part in map(stream.shards.range, range(stream.group.size))]
        logits = collectives.gather(fields["logits"][0], sizes, stream.group)
        fields["logits"] = logits.view(call.shape[0], prompt.keep, -1)
    else:
        fields["logits"] = gather_tokens(fields["logits"], call, installation)
    if collected is not None:
        collected.check()
    return type(out)(**fields)


class _CollectedCache:
    """Stands for a key/value cache while a prompt runs sharded. A layer that hands on keys and values of this rank's
    tokens gets them back, to attend with; the cache gets those of all tokens, 0 at padding."""

    def __init__(self, cache: Any, call: TextCall, installation: Installation) -> None:
        self._cache, self._call, self._installation = cache, call, installation
        self._updated: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """0: nothing came before the prompt."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(1, K, T, D) of this rank's tokens each, which are returned."""
        self._cache.update(self._whole(key_states), self._whole(value_states), layer_idx, *args, **kwargs)
        self._updated.add(layer_idx)
        return key_states, value_states

    def _whole(self, states: Tensor) -> Tensor:
        """(B, K, S, D) of the batch."""
        call, tokens = self._call, len(self._call.stream.own)  # a rank without tokens has a row that counts for nothing
        whole_SKD = stages.gather(states[0].transpose(0, 1)[:tokens], call.stream)
        out, (rows, length) = whole_SKD, call.shape
        if len(call.index) < rows * length:
            out = whole_SKD.new_zeros(rows * length, *whole_SKD.shape[1:]).index_copy_(0, call.index, whole_SKD)
        return out.unflatten(0, (rows, length)).transpose(1, 2)

    def check(self) -> None:
        """Raise unless every attention layer has handed on what it has computed."""
        stack = self._installation.anatomy.decoder
        assert stack is not None
        if len(self._updated) != len(stack.attention):
            raise UnsupportedModelError(
                stack.name,
                expected=f"{len(stack.attention)} layers that update the key/value cache",
                found=f"{len(self._updated)}",
                remedy=_ALONE,
            )
