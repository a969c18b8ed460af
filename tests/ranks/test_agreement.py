"""The message that ranks compare before a forward is short; what they compare is not."""

from __future__ import annotations

from operator import itemgetter

import pytest
import torch.distributed as dist

from triton_sp.errors import DisagreementError, InputError
from triton_sp.ranks import collectives, groups
from triton_sp.ranks.agreement import _difference, agree
from triton_sp.testing import RankError


def job(fields: int, differs: bool) -> None:
    tail = dist.get_rank() if differs else "same"
    agree(groups.resolve_group(), lambda: "\n".join(f"field{i}=value" for i in range(fields)) + f"\nlast={tail}")


def test_equal_descriptions_agree(ranks) -> None:
    ranks.run(job, 500, False, ranks=3)


@pytest.mark.parametrize("fields", [2, 500])
def test_a_difference_is_noticed_beyond_the_message_too(ranks, fields: int) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(job, fields, True, ranks=3)
    assert [type(error) for error in raised.value.errors.values()] == [DisagreementError] * 3


def repeat(kinds: list[str], contents: list[str], other: str) -> list[int]:
    """Several calls with check="first": bytes that each sends. The last rank has other contents in the last call."""
    group, known, sent = groups.resolve_group(), set(), []
    for number, (kind, content) in enumerate(zip(kinds, contents, strict=True)):
        last = number == len(kinds) - 1 and dist.get_rank() == dist.get_world_size() - 1
        mine = other if last else content
        with collectives.record() as ledger:
            full = "{0[0]}\nids={0[1]}".format
            agree(
                group,
                prepare=lambda kind=kind, mine=mine: (kind, mine),
                describe=full,
                brief=itemgetter(0),
                known=known,
            )
        sent.append(ledger.bytes)
    return sent


def test_a_known_kind_costs_24_bytes(ranks) -> None:
    for sent in ranks.run(repeat, ["a", "a", "b", "a"], ["1", "2", "3", "4"], "4", ranks=3):
        assert sent == [2 * 1048, 2 * 24, 2 * 1048, 2 * 24]


def test_what_first_notices_and_what_not(ranks) -> None:
    ranks.run(repeat, ["a", "a"], ["1", "2"], "other", ranks=2)  # a known kind: not noticed
    with pytest.raises(RankError) as raised:
        ranks.run(repeat, ["a", "b"], ["1", "2"], "other", ranks=2)  # a new one
    assert [error.field for error in raised.value.errors.values()] == ["ids", "ids"]


def of_different_kind() -> None:
    """A rank knows the kind, another does not: neither leaves the other waiting."""
    kind = "old" if dist.get_rank() else "new"
    known: set[int] = set()
    agree(groups.resolve_group(), lambda: "old", "kind={}".format, str, known)
    agree(groups.resolve_group(), lambda: kind, "kind={}".format, str, known)


def test_a_kind_that_only_one_rank_knows(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(of_different_kind, ranks=2)
    assert [error.field for error in raised.value.errors.values()] == ["kind", "kind"]


def at_different_steps() -> None:
    """Ranks that are at different steps, and compare things of different kinds."""
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        agree(groups.resolve_group(), lambda: "equal", step="a backward")
    agree(groups.resolve_group(), lambda: "equal", str, str, set(), step="a forward")


def test_different_steps(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(at_different_steps, ranks=3)
    for error in raised.value.errors.values():
        assert error.field == "step" and "a backward on rank 2" in error.found and "a forward" in error.expected


class Unprintable(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError


def unreadable(kind: str) -> None:
    def prepare() -> str:
        if dist.get_rank():
            raise Unprintable if kind == "unprintable" else ValueError("a file named \udcff")
        return "fine"

    agree(groups.resolve_group(), prepare)


@pytest.mark.parametrize("kind", ["unprintable", "surrogates"])
def test_errors_whose_text_cannot_be_sent(ranks, kind: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(unreadable, kind, ranks=2)
    assert isinstance(raised.value.errors[0], DisagreementError) and "rank 1" in raised.value.errors[0].found


def with_details(count: int, changed: int) -> None:
    """Long lists that differ in a line on the last rank, or in length."""
    last = dist.get_rank() == dist.get_world_size() - 1
    lines = [f"weight {i}=float32" for i in range(count)]
    if last:
        lines[changed : changed + 1] = [f"weight {changed}=float16"] if changed < count - 1 else []
    agree(groups.resolve_group(), lambda: f"state={hash(tuple(lines))}", details=lambda: lines)


@pytest.mark.parametrize(("count", "changed"), [(2000, 1234), (40, 39)])
def test_the_line_that_differs_is_named(ranks, count: int, changed: int) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(with_details, count, changed, ranks=3)
    assert [error.field for error in raised.value.errors.values()] == [f"weight {changed}"] * 3


def refused_by_all() -> None:
    def refuse() -> str:
        raise InputError("pixels", expected="some", found="none", remedy="pass them")

    agree(groups.resolve_group(), refuse)


def test_where_all_refuse_each_raises_its_own_error(ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(refused_by_all, ranks=2)
    for rank, error in raised.value.errors.items():
        assert isinstance(error, InputError) and (error.field, error.rank) == ("pixels", rank)


FIRST = ["ok", "ids=1", "mask=2"]


@pytest.mark.parametrize(
    ("other", "field", "expected", "found"),
    [
        (["ok", "ids=1", "mask=3"], "mask", "the same on all ranks (rank 0 has 2)", "3 on rank 4"),
        (["ok", "mask=2"], "ids", "the same on all ranks (rank 0 has 1)", "mask in its place on rank 4"),
        (
            ["ok", "ids=1", "mask=2", "x=1"],
            "batch fields",
            "the 2 fields of rank 0",
            "3 fields, or a longer one, on rank 4",
        ),
        (["ok", "ids=1"], "batch fields", "the 2 fields of rank 0", "1 fields, or a longer one, on rank 4"),
    ],
)
def test_the_first_difference_is_told(other: list[str], field: str, expected: str, found: str) -> None:
    error = _difference(FIRST, other, 4, 2)
    assert (error.field, error.expected, error.found, error.rank) == (field, expected, found, 2)
