"""Before the first collective of a call, all ranks go on together or all ranks raise.

Ranks that were given different batches would wait for one another forever, or use each other's numbers as their own. So
each rank describes what it was given, or says why it cannot use it, in one message of fixed size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypeVar

from triton_sp.errors import DisagreementError, PeerError, SPError
from triton_sp.ranks import collectives
from triton_sp.ranks.boards import board_of
from triton_sp.ranks.failures import text_of
from triton_sp.ranks.groups import Group

_T = TypeVar("_T")
_MOST_KNOWN = 4096  # kinds of batches that are remembered; the ranks forget them at the same call


def agree(
    group: Group,
    prepare: Callable[[], _T],
    describe: Callable[[_T], str] = str,
    brief: Callable[[_T], str] | None = None,
    known: set[int] | None = None,
    *,
    step: str = "a comparison",
    details: Callable[[], list[str]] | None = None,
) -> _T:
    """Compare the inputs of all ranks, and go on with them on all ranks or raise on all of them.

    The ranks first exchange 24 bytes: the digests of the description and of the step, and whether the rank is content.
    The message is of this size whatever the step and the settings, so that ranks which are at different steps find out.

    Args:
        prepare: validates this rank's inputs, and returns what it has made of them.
        describe: from that, what must be equal on all ranks, as lines `field=value`.
        brief: a cheaper `describe`. If it is equal on all ranks and known on each, `describe` is skipped. A rank must
            not decide this alone, because the others would wait for it.
        known: the digests of what the ranks have agreed on before; a new one is added.
        step: what this rank is about to do, which must be the same on all ranks.
        details: what the line `state=...` of the description is a digest of, as lines; asked for where it differs.

    Returns:
        What `prepare` returned.

    Raises:
        SPError: the rank's own, where `prepare` or `describe` raised one.
        DisagreementError: they raised on another rank, or the descriptions or the steps differ.
    """
    board_of(group).begin(step)
    prepared = cache(prepare)  # once, though it may be described twice
    full = cache(lambda: describe(prepared()))
    digest = _digest(full if brief is None else lambda: brief(prepared()))
    content = digest and (brief is None or (known is not None and digest in known))
    everyone = collectives.integers_of_all([digest, int(bool(content)), hashed(step)], group)
    if all(theirs == everyone[0] and theirs[1] for theirs in everyone):
        return prepared()
    try:
        _compare(group, lambda: f"step={step}\n{full()}", details)
    except Exception as error:
        with suppress(AttributeError):
            error.everywhere = not isinstance(error, PeerError)  # type: ignore[attr-defined]
        raise
    if known is not None and digest:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known.add(digest)
    return prepared()


def _digest(describe: Callable[[], str]) -> int:
    """The digest of a description; 0 if there is none, because it or what it describes has raised an error."""
    try:
        return hashed(describe())
    except Exception:
        return 0  # `_compare` will meet it again


def hashed(text: str) -> int:
    """A digest of a text, of 63 bits, never 0."""
    return int.from_bytes(hashlib.blake2s(_bytes(text), digest_size=8).digest(), "little") >> 1 or 1


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # an error may hold a file name that is not Unicode


def _compare(group: Group, describe: Callable[[], str], details: Callable[[], list[str]] | None) -> None:
    failure: BaseException | None = None
    try:
        message = f"ok\n{describe()}"
    except Exception as error:
        failure, message = error, f"error\n{text_of(error)}"
    # A long description is cut to the size of a message; the digest covers all of it.
    notices = collectives.notices_of_all(_bytes(f"{hashed(message):x}\n{message}"), group)
    if isinstance(failure, SPError) and failure.rank is None:
        raise failure.on_rank(group.rank) from failure
    if failure is not None:
        raise failure
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
    lines = [text.splitlines() for text in texts]
    for rank, digest in enumerate(digests):
        if digest == digests[0]:
            continue
        error = _difference(lines[0], lines[rank], rank, group.rank)
        if error.field == "state" and details is not None:
            _compare_details(group, details())
        raise error


def _compare_details(group: Group, lines: list[str]) -> None:
    """Name the first line in which the ranks differ, of lists that may be long: their digests are compared first."""
    longest = max(count for (count,) in collectives.integers_of_all([len(lines)], group))
    own = [hashed(line) for line in lines]
    everyone = collectives.integers_of_all(own + [0] * (longest - len(own)), group)
    index = next(i for i, digests in enumerate(zip(*everyone, strict=True)) if len(set(digests)) > 1)
    line = lines[index] if index < len(lines) else "nothing=nothing"
    texts = [notice.decode(errors="replace") for notice in collectives.notices_of_all(_bytes(line), group)]
    rank = next(rank for rank, digests in enumerate(everyone) if digests[index] != everyone[0][index])
    raise _difference(["", texts[0]], ["", texts[rank]], rank, group.rank)


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
