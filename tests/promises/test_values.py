"""Values that one process refuses are refused on every rank, before anything is sent; the table is in values.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import values
from kit import tiny, zoo

import triton_sp
from triton_sp.errors import InputError
from triton_sp.testing import relative_error


@pytest.mark.parametrize("name", values.TABLES)
def test_every_rank_refuses(ranks, name: str) -> None:
    answers = ranks.run(values.run, name, ranks=2)
    wrong: dict[str, Any] = {}
    for label, entry in values.TABLES[name].items():
        for rank, answer in enumerate(answers):
            alone, here = answer[label]
            fine = isinstance(here, InputError) and here.field == entry.field and here.rank == rank
            if not fine or (not isinstance(alone, BaseException) and not entry.quiet):
                wrong[f"{label}, rank {rank}"] = (alone, here)
    assert not wrong, "\n".join(
        f"{case}: one process {alone!r}, here {here!r}" for case, (alone, here) in wrong.items()
    )
    assert all(isinstance(answer["good"][1], float) for answer in answers), answers  # the group still works


def fraction(items: float) -> tuple[torch.Tensor, torch.Tensor]:
    case = zoo.CASES["llama"]
    batch: dict[str, Any] = case.batch("plain") | {"num_items_in_batch": items}
    model, expected = case.model(), case.model()
    return triton_sp.wrap(model)(**batch).loss.detach(), expected(**batch).loss.detach()


@pytest.mark.parametrize("items", [0.5, 3.5, torch.tensor(0.25)])
def test_the_loss_is_divided_by_a_fraction_as_in_one_process(ranks, items: Any) -> None:
    for found, expected in ranks.run(fraction, items, ranks=2):
        assert relative_error(found, expected) < 1e-6


def second_derivative(name: str, plan: str) -> BaseException | None:
    case = zoo.CASES[name]
    model = triton_sp.wrap(case.model(), config=triton_sp.SPConfig(plan=plan))
    loss = tiny.loss_of(model(**case.batch("plain")))
    try:
        torch.autograd.grad(loss, list(model.parameters())[:1], create_graph=True, allow_unused=True)
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize(("name", "plan"), [("llama", "heads"), ("llama", "segments"), ("vit", "replicate")])
def test_second_derivatives_are_refused(ranks, name: str, plan: str) -> None:
    for error in ranks.run(second_derivative, name, plan, ranks=2):
        assert isinstance(error, InputError) and error.field == "create_graph"
