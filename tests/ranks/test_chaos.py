"""Training that a fault strikes, and its restart: what `make chaos` does with random faults of all kinds."""

from __future__ import annotations

from pathlib import Path

import chaos
import chaos_train
import pytest
from chaos_train import Fault

from triton_sp.errors import PeerError
from triton_sp.testing import RankError

FAULTS = [Fault("exception", 1, 3, "backward"), Fault("disk full", 0, 3, "checkpoint"), Fault("paused", 1, 4, "update")]


@pytest.fixture(scope="module")
def undisturbed(ranks, tmp_path_factory) -> list[str]:
    return ranks.run(chaos_train.train, tmp_path_factory.mktemp("undisturbed"), "loop", 1, ranks=2)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_restart_ends_with_the_weights_of_the_undisturbed_run(ranks, undisturbed, tmp_path: Path, fault) -> None:
    if fault.kind == "paused":
        assert ranks.run(chaos_train.train, tmp_path, "loop", 1, fault, ranks=2) == undisturbed
        return
    with pytest.raises(RankError) as raised:
        ranks.run(chaos_train.train, tmp_path, "loop", 1, fault, ranks=2)
    survivor = raised.value.errors[1 - fault.rank]
    assert isinstance(survivor, PeerError) and survivor.field == f"rank {fault.rank}", survivor
    assert not isinstance(raised.value.errors[fault.rank], PeerError)
    whole = [place.name for place in tmp_path.iterdir() if place.is_dir() and len(list(place.glob("*.pt"))) == 2]
    assert whole == ["2"] and not list(tmp_path.rglob("*.part"))
    assert ranks.run(chaos_train.train, tmp_path, "loop", 1, ranks=2) == undisturbed


def test_scenarios_are_of_every_kind_and_always_the_same() -> None:
    drawn = [chaos.scenario(seed) for seed in range(200)]
    assert drawn == [chaos.scenario(seed) for seed in range(200)]
    assert {case.fault.kind for case in drawn} == set(chaos_train.ACTIONS)
    assert {(case.replicas, case.ranks // case.replicas) for case in drawn} == set(chaos.SHAPES)
    assert {case.engine for case in drawn} == {"loop", "ddp", "fsdp"}
    assert {case.fault.where for case in drawn} == {"tower", "forward", "backward", "update", "checkpoint", "any"}
    assert all(case.fault.rank < case.ranks and case.fault.step < chaos_train.STEPS for case in drawn)


def test_the_document_has_the_runs_that_are_kept() -> None:
    text = chaos.DOCUMENT.read_text()
    assert chaos.written(text) == text
