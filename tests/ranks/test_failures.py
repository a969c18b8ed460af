"""What can go wrong on one rank: the right result, or an error on every rank that names it; all in faults.py."""

from __future__ import annotations

import gc
import itertools
import time
from multiprocessing.connection import Connection

import faults
import pytest
import torch.distributed as dist

from triton_sp import errors
from triton_sp.testing import RankError

SLOW = ("slow", "killed", "stopped", "beside", "lives on", "apart", "meanwhile", "waiting")
QUICK = [name for name in faults.FAULTS if not any(word in name for word in SLOW)]


@pytest.mark.parametrize("name", QUICK)
def test_on_two_ranks(ranks, name: str) -> None:
    row = faults.outcome(ranks, name, 2)
    assert row["fine"], row
    assert row["seconds"] < 30, row  # 5 on a machine that does nothing else, as `make faults` shows


def test_fewer_tokens_than_ranks(ranks) -> None:
    assert faults.outcome(ranks, "fewer tokens than ranks", 4)["fine"]


def test_the_table_that_is_kept_has_every_case_and_none_is_wrong() -> None:
    catalogue, rows = faults.catalogue(), faults.kept()
    assert len(rows) >= 200
    assert {(row["case"], int(row["ranks"])) for row in rows} == set(itertools.product(catalogue, faults.SIZES))
    for row in rows:
        expected = catalogue[row["case"]]
        if expected is None:
            assert row["outcome"] == faults.RIGHT, row
        else:
            assert issubclass(getattr(errors, row["outcome"]), expected), row


def test_the_document_has_the_table() -> None:
    text = faults.DOCUMENT.read_text()
    assert faults.written(text) == text


def ends_slowly() -> None:
    """As a process that is killed while the machine is busy: its connection is gone before it is."""
    if dist.get_rank() == 1:
        for pipe in [thing for thing in gc.get_objects() if type(thing) is Connection]:
            pipe.close()
        time.sleep(60)


def test_a_process_that_ends_is_replaced_before_the_next_job(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(ends_slowly, ranks=2)
    assert isinstance(raised.value.errors[1], EOFError)
    assert ranks.run(dist.get_rank, ranks=2) == [0, 1]
