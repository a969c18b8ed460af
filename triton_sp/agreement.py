"""The agreement check: before the first collective of a forward, all ranks go on or all raise."""

from __future__ import annotations

from collections.abc import Callable

from triton_sp.comm import Group, notices_of_all
from triton_sp.errors import DisagreementError, SPError


def agree(group: Group, describe: Callable[[], str]) -> None:
    """Make all ranks go on, or all ranks raise, before the first collective of a call that one of them can't make.

    Args:
        describe: validates this rank's inputs and returns what must be equal on all ranks, one `field=value` a line.

    Raises:
        SPError: the rank's own, where `describe` raised one.
        DisagreementError: `describe` raised on another rank, or the descriptions differ.
    """
    failure: BaseException | None = None
    try:
        notice = "\n".join(["ok", describe()])
    except Exception as error:
        failure, notice = error, f"error\n{error}"
    notices = [raw.decode(errors="replace") for raw in notices_of_all(notice.encode(), group)]
    if failure is not None:
        if isinstance(failure, SPError) and failure.rank is None:
            raise type(failure)(
                failure.field,
                expected=failure.expected,
                found=failure.found,
                remedy=failure.remedy,
                rank=group.rank,
            ) from failure
        raise failure
    for rank, other in enumerate(notices):
        if other.startswith("error\n"):
            raise DisagreementError(
                "batch",
                expected="an input that every rank can use",
                found=f"rank {rank} refused its own with: {other[6:]}",
                remedy="pass every rank of the group the same, valid batch",
                rank=group.rank,
            )
    _compare(group, notices)


def _compare(group: Group, notices: list[str]) -> None:
    first = notices[0].splitlines()
    for rank, other in enumerate(notices):
        for mine, theirs in zip(first, other.splitlines(), strict=False):
            if mine != theirs:
                name, _, here = mine.partition("=")
                raise DisagreementError(
                    name,
                    expected=f"the same on all ranks (rank 0 has {here})",
                    found=f"{theirs.partition('=')[2]} on rank {rank}",
                    remedy="pass every rank of the group the same batch, model and settings",
                    rank=group.rank,
                )
        if len(first) != len(other.splitlines()):
            raise DisagreementError(
                "batch fields",
                expected=f"the {len(first) - 1} fields of rank 0",
                found=f"{len(other.splitlines()) - 1} fields on rank {rank}",
                remedy="pass every rank of the group the same batch",
                rank=group.rank,
            )
