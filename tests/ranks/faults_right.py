"""What is unusual and right: every rank gets the result of one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from fault import CASE, Fault, batch, culprit, fresh, step, text
from kit import parity, tiny

import triton_sp
from triton_sp.testing import relative_error


def compared(inputs: tiny.Batch) -> None:
    """One step is that of the model in one process."""
    model, expected = fresh(), fresh()
    if (inputs["labels"][:, 1:] == -100).all():
        loss = 0 * sum(parameter.sum() for parameter in expected.parameters())
        loss.backward()  # transformers' own is NaN
    else:
        loss = step(expected, inputs)
    found = step(triton_sp.wrap(model), inputs)
    triton_sp.sync_gradients(model)
    assert relative_error(found, loss) < 1e-6, (found, loss)
    if float(loss.detach()):
        error = parity.gradient_error(parity.gradients(model), parity.gradients(expected))
        assert error[0] < 1e-6, error
    else:
        assert all(float(grad.norm()) == 0 for grad in parity.gradients(model).values())


def images_first() -> tiny.Batch:
    """All images in the first rank's part of the text."""
    inputs, tail = batch(), text(200)
    return inputs | {key: torch.cat([inputs[key], tail[key]], 1) for key in ("input_ids", "labels")}


def nan_in_padding() -> tiny.Batch:
    inputs = text(9, rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"][1, 5:] = -100
    torch.manual_seed(0)
    embeds = torch.randn(2, 9, tiny.WIDTH, dtype=CASE.dtype)
    del inputs["input_ids"]
    return inputs | {"inputs_embeds": embeds}


def compared_nan_in_padding() -> None:
    inputs, model, expected = nan_in_padding(), fresh(), fresh()
    loss = step(expected, inputs)
    poisoned = inputs | {"inputs_embeds": inputs["inputs_embeds"].clone()}
    poisoned["inputs_embeds"][1, 5:] = torch.nan
    assert relative_error(step(triton_sp.wrap(model), poisoned), loss) < 1e-6


def slow() -> None:
    if culprit():
        time.sleep(2)
    compared(batch())


def right(make: Callable[[], tiny.Batch]) -> Fault:
    return Fault(lambda: compared(make()))


FAULTS: dict[str, Fault] = {
    "no image": right(lambda: batch("no_images")),
    "images on one rank's part": right(images_first),
    "all labels ignored": right(lambda: (b := batch()) | {"labels": torch.full_like(b["labels"], -100)}),
    "one token": right(lambda: {"input_ids": torch.tensor([[7]]), "labels": torch.tensor([[-100]])}),
    "fewer tokens than ranks": right(lambda: text(2)),
    "NaN in padded rows": Fault(compared_nan_in_padding),
    "a slow rank": Fault(slow),
}
