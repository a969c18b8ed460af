"""Layers of a wrapped model under torch.compile: the same loss and gradients."""

import pytest
import torch
from kit import parity, zoo
from torch._dynamo.utils import counters

from triton_sp import wrap

CASE = zoo.CASES["llama"]


def compare_with_compiled_layers() -> None:
    plain, layered = wrap(CASE.model()), wrap(CASE.model())
    expected = parity.step(plain, CASE.batch("plain"))
    for layer in layered.get_submodule("model.layers").children():
        layer.compile(backend="eager")
    counters.clear()
    torch.testing.assert_close(parity.step(layered, CASE.batch("plain")), expected, rtol=1e-12, atol=1e-14)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.long
def test_compiled_layers(ranks) -> None:
    ranks.run(compare_with_compiled_layers, ranks=2)
