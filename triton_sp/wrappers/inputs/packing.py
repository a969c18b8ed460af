"""PackingCollator: samples of text and pictures in one row, as documents that do not see one another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.find import find_parts
from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.wrappers.inputs.masks import documents_of
from triton_sp.wrappers.inputs.samples import TOKENS, Sample, joined, row_of, tokens_of
from triton_sp.wrappers.install import installation_of


class PackingCollator:
    """A collate function that packs samples into one row, without padding, as documents that do not see one another.

    The loss and the gradients are those of the samples by themselves: attention begins anew with each document, so do
    positions, and no document predicts the first token of the next. Positions are (1, S). Models with M-RoPE (Qwen-VL,
    GLM-4V) get (4, 1, S): the first row numbers the tokens of each document, by which transformers tells documents
    apart, and the others are what the model's own `get_rope_index` makes of each document and its grids.

    There is no attention_mask in the batch, and there must be no key/value cache: transformers looks for documents in
    training only. A wrapped model needs no care; for another, set `model.config.use_cache = False`.

    Args:
        model: the model that will get the batches, wrapped or not. It is asked whether it tells documents apart, and
            is not kept, so that workers of a DataLoader may take the collator with them.
        collate: makes a batch of a list with one sample: a trainer's collator, or a function that calls a processor.
            If it is None, each sample is a mapping like a processor's output, with or without the axis of the batch.

    Raises:
        UnsupportedModelError: the model does not tell packed documents apart.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> collate = PackingCollator(LlamaForCausalLM(tiny))
    >>> batch = collate([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}])
    >>> {name: value.tolist() for name, value in batch.items()}
    {'input_ids': [[1, 2, 3, 4, 5]], 'labels': [[-100, 2, 3, -100, 5]], 'position_ids': [[0, 1, 2, 0, 1]]}
    """

    def __init__(self, model: nn.Module, collate: Callable[[list[Any]], Sample] | None = None) -> None:
        installation = installation_of(model)
        anatomy = find_parts(model) if installation is None else installation.anatomy
        if anatomy.decoder is None:
            raise UnsupportedModelError(
                type(model).__name__, expected="a model with a decoder", found="none", remedy="pack text only"
            )
        self.collate = collate
        self.rope = _rope_alone(anatomy.entry)
        features = anatomy.fusion.features if anatomy.fusion is not None else ()
        self.per_sample = any(method.per_sample for method in features)
        _check_documents(anatomy.decoder.module, 1 if self.rope is None else 4)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """One row (1, S) of all samples, and their pictures one after another.

        Raises:
            InputError: a sample with a field that is not known, or whose pictures don't fit those of the others.
        """
        rows = [row_of(sample if self.collate is None else self.collate([sample])) for sample in samples]
        positions = [self._positions(row) for row in rows]
        marked = [name for name in TOKENS if any(name in row for row in rows)]
        batch: dict[str, Any] = {name: torch.cat([tokens_of(row, name) for row in rows], 1) for name in marked}
        batch["position_ids"] = torch.cat(positions, -1)
        axis = int(self.per_sample and any(_has_samples(row) for row in rows))
        for name in dict.fromkeys(name for row in rows for name in row if name not in TOKENS):
            batch[name] = joined(name, rows, axis)
        return batch

    def _positions(self, row: dict[str, Any]) -> Tensor:
        """(1, S), or (4, 1, S), of one document."""
        ids = row["input_ids"]
        numbers = torch.arange(ids.shape[1])[None]
        if self.rope is None:
            return numbers
        given = row | {"mm_token_type_ids": tokens_of(row, "mm_token_type_ids")}
        names = inspect.signature(self.rope).parameters
        axes, _ = self.rope(**{name: value for name, value in given.items() if name in names})
        return torch.cat([numbers[None], axes.to(numbers)])


def _has_samples(row: dict[str, Any]) -> bool:
    """Whether its pixels are (B, most of a sample, C, H, W)."""
    return any(isinstance(value, Tensor) and value.ndim == 5 for value in row.values())


def _rope_alone(entry: nn.Module) -> Callable[..., Any] | None:
    """The method of a model that makes positions of three axes, bound to a copy that has no parts and no weights."""
    owner = next((m for m in entry.modules() if hasattr(m, "get_rope_index")), None)
    if owner is None:
        return None
    alone: Any = nn.Module.__new__(type(owner))
    nn.Module.__init__(alone)
    plain = {name: value for name, value in vars(owner).items() if name[0] != "_" and not callable(value)}
    vars(alone).update({name: value for name, value in plain.items() if not isinstance(value, Tensor)})
    return alone.get_rope_index


def _check_documents(decoder: nn.Module, axes: int) -> None:
    """Raise unless a decoder's mask tells two documents apart by such positions."""
    positions = torch.tensor([0, 1, 0, 1], device=next(decoder.parameters()).device).expand(axes, 1, 4)
    try:
        found = documents_of(decoder, {"position_ids": positions if axes > 1 else positions[0]}, (1, 4))
    except InputError:
        found = None
    if found is None or found.tolist() != [[True, False, True, False]]:
        raise UnsupportedModelError(
            type(decoder).__name__,
            expected="a decoder that tells packed documents apart by their positions",
            found="one whose mask does not",
            remedy="give each sample a row of its own, with an attention_mask",
        )
