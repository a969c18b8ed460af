"""What each setting of `check` notices: the table in docs/checks.md is what comes out here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo
from torch import nn

import triton_sp
from triton_sp.errors import SPError

TEXT = Path(__file__).resolve().parents[2] / "docs" / "checks.md"
MODES = ("always", "first", "off")
Batch = dict[str, Any]


def changed(name: str, row: int, column: int, value: float) -> Callable[[Batch, Any], Batch]:
    def change(batch: Batch, _: Any) -> Batch:
        tensor = batch[name].clone()
        tensor[row, column] = value
        return batch | {name: tensor}

    return change


def noise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.rand_like(parameter))


def freeze(batch: Batch, model: Any) -> Batch:
    model.lm_head.requires_grad_(False)
    return batch


def drift(batch: Batch, model: Any) -> Batch:
    noise(model)
    return batch


# What the last rank does differently. All of them leave sizes as they are: with "off" ranks whose sizes differ may die.
DIFFERENCES: dict[str, Callable[[Batch, Any], Batch]] = {
    "other ids": changed("input_ids", 0, -1, 17),
    "other labels": changed("labels", 0, -1, 17),
    "other pixels": changed("pixel_values", 0, 0, 1.0),
    "another divisor of the loss": lambda batch, _: batch | {"num_items_in_batch": 7},
    "the head is frozen": freeze,
    "other weights": drift,
}
TOKENS = 1100  # more than are compared by value with "first"


def long_batch() -> Batch:
    batch = zoo.CASES["llava"].batch("plain")
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    joined = {name: torch.cat([batch[name], ids], 1) for name in ("input_ids", "labels")}
    return {**batch, **joined, "num_items_in_batch": 5}


def run(mode: str, call: int) -> list[str]:
    """The differences that this rank notices, if they come in this call of the model (the first is number 1)."""
    found, batch = [], long_batch()
    for name, change in DIFFERENCES.items():
        model = triton_sp.wrap(zoo.CASES["llava"].model(), config=triton_sp.SPConfig(check=mode))  # type: ignore[arg-type]
        with torch.no_grad():
            for _ in range(call - 1):
                model(**batch)
            inputs = change(batch, model) if dist.get_rank() == dist.get_world_size() - 1 else batch
            try:
                model(**inputs)
            except SPError:
                found.append(name)
    return found


def table() -> dict[tuple[str, str], str]:
    """docs/checks.md: what is noticed, by difference and column."""
    text = TEXT.read_text().split("What no setting sees")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, body = rows[0], rows[1:]
    return {(row[0], column): cell for row in body for column, cell in zip(header[1:], row[1:], strict=True)}


COLUMNS = {
    ("always", 1): '"always"', ("always", 3): '"always"', ("first", 1): '"first", new kind',
    ("first", 3): '"first", known kind', ("off", 1): '"off", first call', ("off", 3): '"off", later',
}  # fmt: skip


@pytest.mark.parametrize(("mode", "call"), COLUMNS)
def test_what_is_noticed(ranks, mode: str, call: int) -> None:
    found = ranks.run(run, mode, call, ranks=2)
    assert found[0] == found[1]
    cells = table()
    for name in DIFFERENCES:
        said = cells[name, COLUMNS[mode, call]]
        late = name == "other weights" and call == 3  # looked at in calls 1, 2 and every hundredth
        expected = said == "yes" or (said == "in 100 calls" and not late)
        assert (name in found[0]) == expected, (name, mode, call, said, found[0])


def test_the_default_is_the_strongest() -> None:
    assert triton_sp.SPConfig().check == MODES[0]
    assert re.search(r"`check=\"always\"`, the default", TEXT.read_text())
