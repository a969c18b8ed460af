"""Decoders whose layers get what all tokens have: parity with one process, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from kit import parity, tiny, zoo
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomBlock

import triton_sp
from triton_sp import SPConfig
from triton_sp.anatomy import families
from triton_sp.anatomy.find import find_parts
from triton_sp.errors import InputError, SPError, UnsupportedModelError
from triton_sp.testing import RankError
from triton_sp.wrappers.decoders import gathered

_SIZES: dict[str, Any] = {"hidden_size": 96, "vocab_size": tiny.VOCAB, "use_cache": False}
_HEADS: dict[str, Any] = {"num_attention_heads": 12, "num_hidden_layers": 2}


def build(name: str) -> nn.Module:
    """ALiBi and attention of its own; a recurrence, whose padding is masked, beside attention; masks of a composite."""
    if name == "paligemma":
        return zoo.CASES[name].model()
    if name == "bloom":
        config = hf.BloomConfig(n_layer=2, n_head=12, hidden_dropout=0.0, attention_dropout=0.0, **_SIZES)
        return tiny.build("BloomForCausalLM", config, "eager", torch.float64)
    experts: dict[str, Any] = {"num_local_experts": 2, "intermediate_size": 40, "num_key_value_heads": 12}
    experts["block_size"] = 8
    config = hf.MiniMaxConfig(**_SIZES, **_HEADS, **experts, head_dim=8)
    config._experts_implementation = "eager"  # the grouped one does not run in float64
    return tiny.build("MiniMaxForCausalLM", config, "sdpa", torch.float64)


def batch_of(name: str, kind: str) -> tiny.Batch:
    return zoo.CASES["paligemma" if name == "paligemma" else "llama"].batch(kind)


def compare(name: str, kind: str, checkpointing: str, gradient: Any) -> tuple[float, str]:
    """The worst error of the loss and of a gradient, against the model on this rank alone."""
    wide = nullcontext() if name == "paligemma" else parity.widened()
    with wide, mock.patch.dict(families.SPANS, clear=True):
        model, batch = build(name), batch_of(name, kind)
        loss, expected = parity.step(model, batch)
        parity.set_checkpointing(model, checkpointing)
        triton_sp.wrap(model, config=SPConfig(plan="heads", gradient=gradient))
        row = triton_sp.explain(model).rows[-1]
        assert row.decision == "sharded, attention gathered" and row.why.startswith("accepted by structure; "), row
        found, gradients = parity.step(model, batch)
    return max((float(abs(found - loss)), "the loss"), parity.gradient_error(gradients, expected))


RUNS = [
    ("bloom", "left_pad", "reentrant", 3),
    ("bloom", "right_pad", "non_reentrant", 2),
    ("minimax", "left_pad", "none", 2),
    ("minimax", "right_pad", "none", 3),  # the first rank has no padding, and so no mask of its own
    ("paligemma", "left_pad", "non_reentrant", 2),
]


@pytest.mark.parametrize(("name", "kind", "checkpointing", "size"), RUNS)
def test_parity(ranks, name: str, kind: str, checkpointing: str, size: int) -> None:
    """With heads that ranks do not divide."""
    gradient = "sum" if size == 3 else "mean"
    for error, where in ranks.run(compare, name, kind, checkpointing, gradient, ranks=size):
        # Gemma's norms are in float32, and the gradient of a key's bias is nothing but their rounding.
        assert error < (2e-6 if name == "paligemma" else 1e-10), (error, where)


def run_wrong(job: str) -> None:
    model, batch = build("bloom").float(), batch_of("bloom", "plain")
    if job == "few":
        batch = {name: value[:1, :1] for name, value in batch.items()}
    changed: Any = {"local": (gathered, "_run_layer", lambda override, *a, **k: override.original(*a, **k))}.get(job)
    changed = changed or (BloomBlock, "forward", partial_roll if job == "block" else BloomBlock.forward)
    with mock.patch.object(*changed):
        triton_sp.wrap(model, config=SPConfig(plan="heads"))(**batch)


def partial_roll(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A block in whose own code tokens meet."""
    return forward(self, hidden_states + hidden_states.roll(1, 1), *args, **kwargs)


forward = BloomBlock.forward
WRONG: dict[str, tuple[type[SPError], str]] = {
    "local": (UnsupportedModelError, "BloomForCausalLM"),  # a layer that sees this rank's tokens only
    "block": (UnsupportedModelError, "transformer.h"),
    "few": (InputError, "input_ids"),
}


@pytest.mark.parametrize("job", WRONG)
def test_refused(ranks, job: str) -> None:
    kind, field = WRONG[job]
    with pytest.raises(RankError) as caught:
        ranks.run(partial(run_wrong, job), ranks=2)
    for error in caught.value.errors.values():
        assert isinstance(error, kind) and error.field == field, error


def test_queries_scaled_by_cache_positions() -> None:
    """Llama 4 with transformers 4.57: a decoder numbers these from its first token, on a shard from the shard's."""
    model = zoo.CASES["llama4_text"].model()
    kind = next(type(module) for module in model.modules() if type(module).__name__ == "Llama4TextAttention")

    def forward(self: Any, hidden: Any, positions: Any, mask: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        scale = torch.floor(cache_position.float())
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, hidden, hidden, hidden * scale, mask)

    decoder = find_parts(model).decoder
    assert decoder is not None and not decoder.gathered
    with mock.patch.object(kind, "forward", forward):
        decoder = find_parts(model).decoder
        assert decoder is not None and decoder.gathered and "cache_position" in decoder.why_gathered
