"""The errors that users see.

Every message names the field, what was expected, what was found and the remedy, so that users can act on it without
reading this library. All errors are `ValueError`s, so a caller can catch them with `except ValueError`.
"""

from __future__ import annotations

import torch


class SPError(ValueError):
    """The base of every error that triton_sp raises for its users.

    Args:
        field: the argument, the field of a batch or the module that is at fault.
        expected, found: what it should be, and what it is.
        remedy: what the user can do.
        rank: the rank that found the error, if several ranks raise.

    >>> print(SPError("labels", expected="shape (2, 8)", found="shape (2, 7)", remedy="pass one label per token"))
    labels: expected shape (2, 8), found shape (2, 7). Remedy: pass one label per token.
    """

    def __init__(self, field: str, *, expected: str, found: str, remedy: str, rank: int | None = None) -> None:
        self.field, self.expected, self.found, self.remedy, self.rank = field, expected, found, remedy, rank
        where = "" if rank is None else f"[rank {rank}] "
        super().__init__(f"{where}{field}: expected {expected}, found {found}. Remedy: {remedy}.")

    def on_rank(self, rank: int) -> SPError:
        """The same error, which names the rank that raises it.

        >>> print(SPError("x", expected="1", found="2", remedy="pass 1").on_rank(3))
        [rank 3] x: expected 1, found 2. Remedy: pass 1.
        """
        return _rebuild(type(self), self.field, self.expected, self.found, self.remedy, rank)

    def __reduce__(self) -> tuple[object, ...]:
        """How to pickle an error, which does not work by itself for exceptions with keyword-only arguments."""
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


def shown(value: object) -> str:
    """What a tensor, or something in the place of one, is, for `found` of an error.

    >>> import torch
    >>> shown(torch.zeros(2, 3)), shown([])
    ('float32 of shape (2, 3)', 'a list')
    """
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _rebuild(cls: type[SPError], field: str, expected: str, found: str, remedy: str, rank: int | None) -> SPError:
    return cls(field, expected=expected, found=found, remedy=remedy, rank=rank)


class InputError(SPError):
    """An argument of a call, or a field of a batch, cannot be used."""


class GroupError(SPError):
    """The process group is missing, cannot be used, or does not contain this rank."""


class UnsupportedModelError(SPError):
    """A part of a model cannot be sharded correctly. The field names the module."""


class DisagreementError(SPError):
    """The ranks of a group were given different batches, models or settings."""


class PeerError(SPError):
    """Another rank of the group has failed, ended or stopped in the middle of a step. The group is closed."""


class VerificationError(SPError):
    """Attention of a layer is not what one rank computes of it alone. The field names the layer; `SPConfig(verify=n)`
    asks for this."""


class UnsupportedKernelError(SPError):
    """No implementation of an operator supports what it was asked for."""
