"""Where packed documents begin, as each decoder's own mask has it."""

from __future__ import annotations

import pytest
import torch
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.testing import relative_error
from triton_sp.wrappers.inputs.masks import documents_of

MROPE = {tiny.ROPE: tiny.MROPE}


def decoder(name: str) -> nn.Module:
    if name == "paddleocr_vl":  # no family of ours
        config = tiny.text_config("PaddleOCRText", kv_heads=4, rope_parameters=tiny.MROPE, layers=2)
        return tiny.build("PaddleOCRTextModel", config, "sdpa", torch.float64)
    model = zoo.CASES[name].build(torch.float32)
    return model.get_decoder()


RESTARTING = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
VISUAL = torch.stack([RESTARTING // 2] * 3)
STARTS = [[0, 3], [0, 2]]
WHOLE = [[0], [0]]


@pytest.mark.parametrize(
    ("name", "positions", "begins"),
    [
        ("llama", RESTARTING, STARTS),
        ("qwen3_vl", RESTARTING, STARTS),
        ("qwen3_vl", VISUAL, WHOLE),
        ("qwen2_5_vl", RESTARTING, WHOLE),
        ("qwen2_5_vl", torch.cat([RESTARTING[None], VISUAL]), STARTS),
        ("glm4v", RESTARTING, WHOLE),
        ("gemma3", RESTARTING, STARTS),
        ("paddleocr_vl", RESTARTING, WHOLE),
    ],
)
def test_documents(name: str, positions: torch.Tensor, begins: list[list[int]]) -> None:
    module = decoder(name)
    before = module.config
    found = documents_of(module, {"position_ids": positions}, (2, 5))
    assert [row.nonzero().flatten().tolist() for row in found] == begins
    assert module.config is before
    assert documents_of(module, {"position_ids": torch.arange(5)[None]}, (2, 5)) is None
    assert documents_of(module, {"position_ids": positions, "attention_mask": torch.ones(2, 5)}, (2, 5)) is None


def compare() -> tuple[float, float]:
    """Of a decoder of no known family, on more rows than ranks, with positions that restart."""
    ids = torch.arange(5, 5 + 44).view(4, 11)
    batch = {"input_ids": ids, "position_ids": torch.tensor([[*range(6), *range(5)]] * 4)}
    results = []
    for wrapped in (False, True):
        model = decoder("paddleocr_vl")
        if wrapped:
            triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads", gather_logits=True))
        out = model(**batch).last_hidden_state
        weight = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        (out * weight).mean().backward()
        if wrapped:
            triton_sp.sync_gradients(model)
        results.append((out.detach(), parity.gradients(model)))
    (expected, grads), (found, our_grads) = results
    return relative_error(found, expected), parity.gradient_error(our_grads, grads)[0]


def test_positions_that_mark_no_documents(ranks) -> None:
    for states, grads in ranks.run(compare, ranks=2):
        assert states < 1e-10 and grads < 1e-10
