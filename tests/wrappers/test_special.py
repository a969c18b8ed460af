"""Models whose attention, positions or tokens are special: parity with one process, and mutants that it notices."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from kit import parity, zoo
from kit.parity import Plan, checkpointed, heads, hold

from triton_sp.anatomy import families
from triton_sp.anatomy.families import MAKES_SPANS, spans_of
from triton_sp.anatomy.find import find_parts
from triton_sp.wrappers.decoders import cross
from triton_sp.wrappers.inputs import layout
from triton_sp.wrappers.layers import attention

# In the suite, on two ranks; head counts that these do not divide are in the cases themselves.
QUICK = {
    "deepseek_v3_5": [Plan("left_pad", config=heads(2))],
    "gpt2": [Plan("packed", config=heads(2))],
    "opt": [Plan("left_pad", "non_reentrant", heads(2))],
    "llama4_text": [Plan("packed", "non_reentrant", heads(2)), Plan("left_pad", config=heads(2))],
    "llama4": [Plan("left_pad", config=heads(2))],
    "gemma4": [Plan("left_pad", "non_reentrant", config=heads(2))],
    "kimi_k25": [Plan("plain", config=heads(2))],
    "mllama": [Plan("left_pad", config=heads(2))],
    "gpt_oss": [Plan("left_pad", config=heads(2)), Plan("packed", "non_reentrant", heads(2))],
}


@pytest.mark.parametrize("name", QUICK)
def test_parity(ranks, reference, name: str) -> None:
    hold(ranks, reference, name, QUICK[name], 2)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", [case.name for case in zoo.special.cases()])
def test_parity_of_everything(ranks, reference, name: str, size: int) -> None:
    """Every batch, and checkpointing of both kinds, in float64."""
    case, config = zoo.CASES[name], heads(size)
    tricky = next(batch for batch in ("image_and_video", "packed", "left_pad", "plain") if batch in case.batches)
    plans = [Plan(batch, config=config) for batch in case.batches] + checkpointed(case, tricky, config)
    hold(ranks, reference, name, plans, size)


def attend_to_keys_without_gradient(module: Any, query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> Any:
    """A layer that reuses the keys and values of another one, as if they were nobody's."""
    if getattr(module, "is_kv_shared_layer", False):
        key, value = key.detach(), value.detach()
    return attention_forward(module, query, key, value, *rest, **kwargs)


def attend_without_sinks(*states: Any, s_aux: Any = None, **kwargs: Any) -> Any:
    """The sinks are dropped in silence."""
    return attention_forward(*states, **kwargs)


def localise_without_rows(arguments: dict[str, Any], call: Any) -> None:
    """Every token sees the images of all rows."""
    localise(arguments, call)
    if cross.STATES in arguments:
        arguments[cross.MASK] = torch.zeros_like(arguments[cross.MASK])


attention_forward, localise = attention.attention_forward, cross.localise
SPANS_EVERYWHERE = families.SPANS | {"gemma4": replace(families.SPANS["gemma4"], causal_layers=None)}
# name: the model and the batch that show it, and what is replaced by what
MUTANTS: dict[str, tuple[str, str, Any, str, Any]] = {
    "keys unshared": ("gemma4_text", "plain", attention, "attention_forward", attend_to_keys_without_gradient),
    "sinks ignored": ("gpt_oss", "plain", attention, "attention_forward", attend_without_sinks),
    "spans in all layers": ("gemma4", "left_pad", families, "SPANS", SPANS_EVERYWHERE),
    "images of other rows": ("mllama", "left_pad", cross, "localise", localise_without_rows),
    "chunks ignored": ("llama4_text", "plain", layout, "CHUNKED", "no such layers"),
    "tokens numbered on the shard": ("llama4_text", "plain", attention, "numbers_its_tokens", lambda module: False),
}


def run_mutant(mutant: str, path: Any) -> parity.Parity:
    name, batch, owner, attribute, broken = MUTANTS[mutant]
    with mock.patch.object(owner, attribute, broken):
        return parity.run(zoo.CASES[name], Plan(batch, config=heads(2)), path)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_notices(ranks, reference, mutant: str) -> None:
    for result in ranks.run(run_mutant, mutant, reference(*MUTANTS[mutant][:2]), ranks=2):
        assert result.gradient > 1e-4, result


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_spans_are_known_where_the_model_makes_them_so(monkeypatch, name: str) -> None:
    """In transformers 5.10 images of Gemma see each other in another way; no rule is assumed there."""
    model = zoo.CASES[name].model()
    decoder = find_parts(model).decoder
    assert decoder is not None and spans_of(model, decoder.module) is not None
    monkeypatch.delattr(sys.modules[type(model).__module__], MAKES_SPANS)
    assert spans_of(model, decoder.module) is None
