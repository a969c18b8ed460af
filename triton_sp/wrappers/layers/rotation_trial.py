"""The trial of a module's rotary embeddings: whether the pack computes them too.

Its own code rotates, and two things are seen. Attention is given the very numbers that its function has returned, in
memory, so nothing happens to q and k in between. And of random q, k, cos and sin the function makes what
`ops.reference.turn` makes of them, in float32 or wider: what is a product of two of them cannot do so by chance.
Nothing is sent, and each rank may come to its own result: rotated here or there, the same numbers travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sp.ops import reference
from triton_sp.ops.pack import Rotation


class Layout(NamedTuple):
    """How a module has its q and k where it rotates them: their dims, the dim of tokens, and what makes (1, H, T, D) of
    them for attention."""

    dims: int
    tokens: int
    lay: Callable[[Tensor], Tensor]


LAYOUTS = (
    Layout(4, 2, lambda x: x),
    Layout(3, 0, lambda x: x.transpose(0, 1)[None]),
    Layout(4, 1, lambda x: x.transpose(1, 2)),
)


class Rotated(NamedTuple):
    """A call of a function that rotates: what it was given, what it returned, and how often that had been written."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[Tensor, Tensor]
    versions: list[int]


def try_rotation(calls: Sequence[Rotated], query: Tensor, key: Tensor) -> tuple[int, str]:
    """The layout, and why the pack cannot rotate in the place of the module's own code; nothing if it can.

    Args:
        calls: of its function that rotates, in one run.
        query, key: what attention was given then, (1, H, T, D).
    """
    if len(calls) != 1:
        return 0, f"called {len(calls)} times" if calls else "it does not rotate"
    (call,) = calls
    q, k, cos, sin, *_ = call.given
    given = [n for n, layout in enumerate(LAYOUTS) if _hands_on(call, layout, (query, key))]
    if not given or (q.shape, k.shape) != tuple(x.shape for x in call.made):
        return 0, "attention is given something else than what it has rotated"
    if [version(x) for x in call.made] != call.versions:
        return 0, "it changes q or k after it has rotated them"
    if not fit(query.shape[2], query.shape[3], cos, sin):
        return 0, f"cos of shape {tuple(cos.shape)} for {query.shape[2]} tokens, or one that is trained"
    return given[0], _compare(call, LAYOUTS[given[0]])


def _hands_on(call: Rotated, layout: Layout, attended: tuple[Tensor, Tensor]) -> bool:
    """Whether attention is given, in this layout, what the function has returned."""
    return all(x.ndim == layout.dims and is_view(y, layout.lay(x)) for x, y in zip(call.made, attended, strict=True))


def _compare(call: Rotated, layout: Layout) -> str:
    """What is wrong with a function on random numbers of a few tokens."""
    (q, k, cos, sin, *more), name = call.given, call.function.__name__
    axes = (layout.tokens, layout.tokens, cos.ndim - 2, sin.ndim - 2)
    random = [_random(x, axis, seed) for seed, (x, axis) in enumerate(zip((q, k, cos, sin), axes, strict=True))]
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        try:
            made = call.function(*random, *more, **call.kwargs)
        except Exception as error:  # a function of anybody's
            return f"{type(error).__name__} in {name} of a few tokens"
        rotation = tables(*random[2:])
        theirs, ours = ([layout.lay(x)[0].transpose(0, 1) for x in pair] for pair in (made, random[:2]))
        ours = [reference.turn(x, rotation) for x in ours]
    few = 16 * torch.finfo(ours[0].dtype).eps
    same = all(torch.allclose(x.to(y.dtype), y, rtol=few, atol=few) for x, y in zip(theirs, ours, strict=True))
    return "" if same else f"{name} rotates in another way or precision"


def _random(like: Tensor, tokens: int, seed: int) -> Tensor:
    """Random numbers in float32 or wider, of a few tokens."""
    shape = like.narrow(tokens, 0, min(4, like.shape[tokens])).shape
    generator = torch.Generator().manual_seed(seed)  # the program's own stays as it is
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=wide).to(like.device)


def tables(cos: Tensor, sin: Tensor) -> Rotation:
    """The rotation by tables that `fit`."""
    return Rotation(cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))


def fit(tokens: int, dim: int, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are tables (T, d), of any number of dimensions, that are not trained."""
    whole = cos.ndim > 1 and cos.shape == sin.shape and cos.shape[-2] == tokens
    narrow = cos.shape[-1] <= dim and cos.shape[-1] % 2 == 0
    return whole and narrow and cos.numel() == tokens * cos.shape[-1] and not (cos.requires_grad or sin.requires_grad)


def is_view(x: Tensor, of: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, in the same order."""
    same = x.shape == of.shape and x.data_ptr() == of.data_ptr() and x.dtype == of.dtype
    return same and (x.stride() == of.stride() or _steps(x) == _steps(of))


def _steps(x: Tensor) -> list[int]:
    """The strides that matter: where there is more than one."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def version(x: Tensor) -> int:
    """How often a tensor was written to; in inference mode that is not known."""
    return -1 if x.is_inference() else x._version
