"""What users see when something cannot be done.

Every message names the field, what was expected, what was found and the remedy, so that it can be acted on without
reading this library. All of them are `ValueError`s, so `except ValueError` is enough for a caller.
"""

from __future__ import annotations


class SPError(ValueError):
    """Base of every error that triton_sp raises for its users.

    >>> print(SPError("labels", expected="shape (2, 8)", found="shape (2, 7)", remedy="pass one label per token"))
    labels: expected shape (2, 8), found shape (2, 7). Remedy: pass one label per token.
    """

    def __init__(self, field: str, *, expected: str, found: str, remedy: str, rank: int | None = None) -> None:
        self.field, self.expected, self.found, self.remedy, self.rank = field, expected, found, remedy, rank
        where = "" if rank is None else f"[rank {rank}] "
        super().__init__(f"{where}{field}: expected {expected}, found {found}. Remedy: {remedy}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Exceptions with keyword-only arguments do not pickle by themselves, and ranks send theirs to one another."""
        return _rebuild, (type(self), self.field, self.expected, self.found, self.remedy, self.rank)


def require(ok: object, kind: type[SPError], field: str, expected: str, found: object, remedy: str) -> None:
    """Raise an error unless `ok` is true.

    Args:
        found: what there is instead, shown by `str`.

    >>> require(1 < 2, InputError, "labels", "one per token", "none", "pass labels")
    >>> require(False, InputError, "labels", "one per token", "none", "pass labels")
    Traceback (most recent call last):
    triton_sp.errors.InputError: labels: expected one per token, found none. Remedy: pass labels.
    """
    if not ok:
        raise kind(field, expected=expected, found=str(found), remedy=remedy)


def _rebuild(cls: type[SPError], field: str, expected: str, found: str, remedy: str, rank: int | None) -> SPError:
    return cls(field, expected=expected, found=found, remedy=remedy, rank=rank)


class InputError(SPError):
    """An argument of a call, or a field of a batch, is not usable."""


class GroupError(SPError):
    """The process group is missing, unusable, or does not contain this rank."""


class UnsupportedModelError(SPError):
    """A part of a model cannot be sharded correctly; the field names the module."""


class DisagreementError(SPError):
    """The ranks of a group were given different batches, models or settings."""


class PeerError(SPError):
    """Another rank of the group failed, ended or stopped in the middle of a step. The group can't be used any more."""


class UnsupportedKernelError(SPError):
    """An operator was asked for something that no implementation of it supports."""
