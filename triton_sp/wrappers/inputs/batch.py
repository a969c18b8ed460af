"""A batch of text as one value: the arguments of the wrapped model's forward, validated."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import Anatomy, Spans, Stack, takes_positions
from triton_sp.errors import InputError, shown
from triton_sp.loss import IGNORE, shift
from triton_sp.wrappers.inputs.masks import chunks_of, documents_of
from triton_sp.wrappers.inputs.values import (
    check_devices,
    check_ids,
    check_items,
    check_labels,
    check_names,
    check_pixels,
)
from triton_sp.wrappers.install import Override

CACHES = ("past_key_values", "cache")  # the second from transformers 5.24 on, which takes both
_REMEDIES = {
    "output_attentions": "attention weights are never formed; call triton_sp.unwrap(model) to look at them",
    "output_hidden_states": "take last_hidden_state of the model without its head",
    "logits_to_keep": "out.logits holds this rank's tokens only; select from SPConfig(gather_logits=True)",
    "encoder_hidden_states": "cross attention is not sharded; leave it out",
    "shift_labels": "pass labels; they are shifted on the whole sequence before it is sharded",
}


@dataclass(frozen=True, eq=False)
class Batch:
    """The whole batch, the same on every rank.

    Attributes:
        tokens: (B, S) ids, or (B, S, C) embeddings.
        mask: (B, S), non-zero at tokens; None if all are.
        documents: (B, S) bool on the CPU, where packed documents begin, or None.
        chunks: (B, S) bool on the CPU, where chunks begin for layers whose attention is chunked, or None.
        mutual: (B, S) bool, the tokens that see one another in runs (see `Spans`), or None.
        labels: (B, S), or None.
        targets: (B, S), the labels shifted to the tokens that predict them, or None.
        items: how many labels the caller says that the loss is divided by, or None.
    """

    tokens: Tensor
    mask: Tensor | None
    documents: Tensor | None
    chunks: Tensor | None
    mutual: Tensor | None
    labels: Tensor | None
    targets: Tensor | None
    items: Tensor | int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        rows, length = self.tokens.shape[:2]
        return rows, length

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.tokens.device

    @property
    def label_count(self) -> Tensor | int:
        """What the summed loss is divided by."""
        if self.items is not None:
            return self.items
        return 0 if self.targets is None else (self.targets != IGNORE).sum()


def decodes(override: Override, arguments: dict[str, Any]) -> bool:
    """Whether the call reads or writes a key/value cache, which holds whole sequences."""
    if override.module.training and torch.is_grad_enabled():
        return False  # a step of training: read_batch refuses a cache there
    return bool(arguments.get("use_cache")) or any(arguments.get(name) is not None for name in CACHES)


def refuse(arguments: dict[str, Any], *names: str) -> None:
    """Raise an InputError for arguments that ask for what is not formed, or not handled."""
    for name in names:
        value = arguments.get(name)
        if value is not None and not (isinstance(value, (bool, int)) and value == 0):
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(name, expected=f"{name} left out", found=shown, remedy=_REMEDIES[name])


def read_batch(override: Override, arguments: dict[str, Any], decoder: Stack) -> Batch:
    """The batch that the arguments of a call hold.

    Raises:
        InputError: a field is missing, does not fit the others, or is not handled.
    """
    refuse(arguments, *_REMEDIES)
    _refuse_cache(arguments)
    tokens = _tokens(arguments)
    rows, length = tokens.shape[:2]
    _check_shapes(decoder.module, arguments, rows, length)
    _check_loss(override, arguments)
    _check_values(override, arguments, tokens)
    labels = arguments.get("labels")
    labels = None if labels is None else labels.to(tokens.device)
    whole = bool(decoder.gathered)  # its layers get the whole batch, and masks and positions of their own making
    return Batch(
        tokens,
        mask=arguments.get("attention_mask"),
        documents=None if whole else documents_of(decoder.module, arguments, (rows, length)),
        chunks=None if whole else chunks_of(decoder.module, arguments, (rows, length)),
        mutual=_mutual(decoder.spans, arguments),
        labels=labels,
        targets=None if labels is None else shift(labels) if _shifts_labels(override.module) else labels,
        items=arguments.get("num_items_in_batch"),
    )


def check_pixels_alone(anatomy: Anatomy, arguments: dict[str, Any]) -> None:
    """Raise an InputError for what a vision model is given and cannot use."""
    refuse(arguments, "output_attentions")
    check_names(anatomy, arguments)
    pixels = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    if pixels is not None:
        check_devices(arguments, pixels.device)


def _refuse_cache(arguments: dict[str, Any]) -> None:
    for name in ("use_cache", *CACHES):
        if arguments.get(name) not in (None, False):
            raise InputError(
                name,
                expected=f"{name} left out in training",
                found=f"{arguments[name]!s:.40}",
                remedy="a cache holds whole sequences; use it in eval mode or under torch.no_grad()",
            )


def _tokens(arguments: dict[str, Any]) -> Tensor:
    """The ids (B, S), or the embeddings (B, S, C)."""
    name = next((name for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None), None)
    if name is None:
        raise InputError("input_ids", expected="ids or inputs_embeds", found="neither", remedy="pass one of them")
    if name == "input_ids" and arguments.get("inputs_embeds") is not None:
        raise InputError("inputs_embeds", expected="ids or inputs_embeds", found="both", remedy="pass one of them")
    tokens, axes = arguments[name], 2 if name == "input_ids" else 3
    fits = isinstance(tokens, Tensor) and tokens.ndim == axes
    if not fits or not (tokens.dtype in (torch.int64, torch.int32) if axes == 2 else tokens.is_floating_point()):
        expected = "int64 or int32 (B, S)" if axes == 2 else "floating embeddings (B, S, C)"
        raise InputError(name, expected=expected, found=shown(tokens), remedy="pass a batch of token ids")
    return tokens


def _check_shapes(decoder: nn.Module, arguments: dict[str, Any], rows: int, length: int) -> None:
    for name in ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
        value = arguments.get(name)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != (rows, length)):
            expected = f"a tensor of shape {(rows, length)}"
            raise InputError(name, expected=expected, found=shown(value), remedy="give one entry a token")
    positions = arguments.get("position_ids")
    if positions is not None and not takes_positions(decoder):
        raise InputError(
            "position_ids", expected="none", found=shown(positions), remedy="this model numbers its tokens itself"
        )
    if positions is None and arguments.get("cu_seq_lens_q") is not None:
        raise InputError(
            "cu_seq_lens_q", expected="position_ids with it", found="none", remedy="mark documents by position_ids"
        )
    if positions is not None and not _fits(positions, rows, length):
        raise InputError(
            "position_ids",
            expected=f"integers ({rows}, {length}), (1, {length}) or (axes, {rows}, {length})",
            found=shown(positions),
            remedy="give the positions of the whole sequence",
        )


def _fits(positions: Any, rows: int, length: int) -> bool:
    plain = isinstance(positions, Tensor) and positions.ndim in (2, 3) and not positions.is_floating_point()
    return plain and positions.shape[-1] == length and positions.shape[-2] in (1, rows)


def _check_values(override: Override, arguments: dict[str, Any], tokens: Tensor) -> None:
    anatomy, entry, labels = override.installation.anatomy, override.module, arguments.get("labels")
    check_names(anatomy, arguments)
    check_devices(arguments, tokens.device)
    check_ids(tokens, anatomy.fusion, _call(entry, "get_input_embeddings"))
    if labels is not None:
        check_labels(labels, _call(entry, "get_output_embeddings"))
    check_items(arguments.get("num_items_in_batch"), labels is not None and bool((labels[:, 1:] != IGNORE).any()))
    if anatomy.fusion is not None:
        check_pixels(anatomy.fusion, arguments, anatomy.towers[0].unit if anatomy.towers else 1)


def _call(module: Any, method: str) -> Any:
    """What a method of a model returns; None where it has none, or cannot tell."""
    try:
        return getattr(module, method)()
    except (AttributeError, NotImplementedError):
        return None


def _check_loss(override: Override, arguments: dict[str, Any]) -> None:
    labelled = arguments.get("labels") is not None
    trained = override.module.training and not override.installation.config.gather_logits
    if not labelled and trained and arguments.get("num_items_in_batch") is not None:
        raise InputError(
            "num_items_in_batch",
            expected="labels with it",
            found="none: a trainer forms the loss from out.logits itself, which hold this rank's tokens",
            remedy="smooth labels by SPConfig(label_smoothing=...) and leave label_smoothing_factor 0; for another "
            "loss of your own, SPConfig(gather_logits=True)",
        )
    if labelled and not _loss_is_shifted_cross_entropy(override.module):
        raise InputError(
            "labels",
            expected="a model whose loss is the shifted cross entropy",
            found=f"{override.module.loss_type} loss",
            remedy="compute the loss from the outputs (SPConfig(gather_logits=True))",
        )


def _loss_is_shifted_cross_entropy(entry: nn.Module) -> bool:
    """Whether the model's own loss is the shifted cross entropy that loss.py shards."""
    loss = getattr(entry, "loss_function", None)
    return loss is None or getattr(loss, "__name__", "") == "ForCausalLMLoss"


def _shifts_labels(entry: nn.Module) -> bool:
    """Whether a model takes a label for what the token before it predicts. BART and those that were made after it,
    which form their loss themselves, take it for what its own token predicts."""
    code = inspect.unwrap(type(entry).forward).__code__
    own = "CrossEntropyLoss" in code.co_names and "loss_function" not in code.co_names
    return not own or any("shift" in name for name in code.co_varnames)


def _mutual(spans: Spans | None, arguments: dict[str, Any]) -> Tensor | None:
    """(B, S), the tokens that see one another in runs, as the model itself would take it from the types of tokens."""
    if spans is None:
        return None
    types = arguments.get(spans.types)
    if spans.required and types is None:
        raise InputError(
            spans.types,
            expected="one for each token: without them this model's attention depends on padding and implementation",
            found="none",
            remedy=f"pass the processor's: {spans.token_types[0]} at the tokens that see one another",
        )
    if types is None or not spans.token_types:
        return None
    return torch.isin(types, types.new_tensor(spans.token_types))
