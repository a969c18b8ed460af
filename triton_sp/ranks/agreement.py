"""Before the first collective of a call, all ranks go on together or all ranks raise.

Ranks that were given different batches would wait for one another forever, or use each other's numbers as their own. So
each rank describes what it was given, or says why it cannot use it, in one message of fixed size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from triton_sp.errors import DisagreementError, SPError
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group

_T = TypeVar("_T")


def agree(
    group: Group,
    prepare: Callable[[], _T],
    describe: Callable[[_T], str] = str,
    brief: Callable[[_T], str] | None = None,
    known: set[int] | None = None,
) -> _T:
    """Compare the inputs of all ranks, and go on with them on all ranks or raise on all of them.

    Args:
        prepare: validates this rank's inputs, and returns what it has made of them.
        describe: from that, what must be equal on all ranks, as lines `field=value`.
        brief: a cheaper `describe`. With it the ranks first exchange only the digest of this description and whether
            they know it already, 16 bytes. If all digests are equal and known on every rank, `describe` is skipped. A
            rank must not decide this alone, because the others would wait for it.
        known: the digests that the ranks have agreed on before; a new one is added.

    Returns:
        What `prepare` returned.

    Raises:
        SPError: the rank's own, where `prepare` or `describe` raised one.
        DisagreementError: they raised on another rank, or the descriptions differ.
    """
    prepared = cache(prepare)  # once, though it may be described twice
    digest = None
    if brief is not None and known is not None:
        digest = _digest(lambda: brief(prepared()))
        everyone = collectives.integers_of_all([digest, digest in known], group)
        if all(seen and theirs == digest for theirs, seen in everyone):
            return prepared()
    _compare(group, lambda: describe(prepared()))
    if known is not None and digest is not None:
        known.add(digest)
    return prepared()


def _digest(brief: Callable[[], str]) -> int:
    """The digest of a description, 63 bits; 0 if there is no description, and 0 is never a known digest."""
    try:
        return int.from_bytes(hashlib.blake2s(brief().encode(), digest_size=8).digest(), "little") >> 1
    except Exception:
        return 0  # `_compare` will meet it again


def _compare(group: Group, describe: Callable[[], str]) -> None:
    failure: BaseException | None = None
    try:
        text = describe()
        # A long description is cut to the size of a message; the digest covers all of it.
        message = f"ok\n{text}", hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
    except Exception as error:
        failure, message = error, (f"error\n{error}", "")
    notices = collectives.notices_of_all(f"{message[1]}\n{message[0]}".encode(), group)
    if failure is not None:
        raise _with_rank(failure, group.rank)
    digests, texts = zip(*(notice.decode(errors="replace").split("\n", 1) for notice in notices), strict=True)
    for rank, text in enumerate(texts):
        if text.startswith("error\n"):
            raise DisagreementError(
                "batch",
                expected="an input that every rank can use",
                found=f"rank {rank} refused its own with: {text[6:]}",
                remedy="pass every rank of the group the same, valid batch",
                rank=group.rank,
            )
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise _difference(texts[0].splitlines(), texts[rank].splitlines(), rank, group.rank)


def _with_rank(failure: BaseException, rank: int) -> BaseException:
    if not isinstance(failure, SPError) or failure.rank is not None:
        return failure
    named = type(failure)(
        failure.field, expected=failure.expected, found=failure.found, remedy=failure.remedy, rank=rank
    )
    named.__cause__ = failure
    return named


def _difference(first: list[str], other: list[str], rank: int, own_rank: int) -> DisagreementError:
    """An error about the first field in which the description of a rank differs from that of rank 0."""
    pairs = [pair for pair in zip(first, other, strict=False) if pair[0] != pair[1]]
    if pairs:
        (name, _, here), (other_name, _, there) = (line.partition("=") for line in pairs[0])
        field, expected = name, f"the same on all ranks (rank 0 has {here})"
        found = f"{there} on rank {rank}" if name == other_name else f"{other_name} in its place on rank {rank}"
    else:
        field, expected = "batch fields", f"the {len(first) - 1} fields of rank 0"
        found = f"{len(other) - 1} fields, or a longer one, on rank {rank}"
    return DisagreementError(
        field,
        expected=expected,
        found=found,
        remedy="pass every rank of the group the same batch, model and settings",
        rank=own_rank,
    )
