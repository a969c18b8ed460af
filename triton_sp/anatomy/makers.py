"""Which parts of a composite make features of each rank's own images only, told by the code of its feature methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn

from triton_sp.anatomy.parts import FeatureMethod, Stack, code_names, contains

CUT_BETWEEN_IMAGES = ("images", "frames")


def makers_of(composite: nn.Module, features: Iterable[FeatureMethod], decoder: Stack, path: str) -> tuple[str, ...]:
    """The names of the composite's parts that only methods use which run on a rank's own images: not those that its
    forward, or another method of features, calls as well, nor one that holds the decoder.

    Args:
        path: the name of the composite.
    """
    methods = {method.method for method in features if method.granularity in CUT_BETWEEN_IMAGES}
    others = {name for name in dir(type(composite)) if name.startswith("get_") and name.endswith("_features")} - methods
    cut = set[str]().union(*(_used(type(composite), method) for method in methods))
    whole = set[str]().union(*(_used(type(composite), name, without=methods) for name in (*others, "forward")))
    children = {name: part for name, part in composite.named_children() if not contains(part, decoder.module)}
    return tuple(f"{path}.{name}".strip(".") for name in children if name in cut - whole)


def _used(kind: type, method: str, without: Iterable[str] = ()) -> set[str]:
    """The names that the code of a method uses, and that of methods of the same class which it calls."""
    own, names, left = vars(kind), set[str](), [method]
    seen = {*without}
    while left:
        name = left.pop()
        if name in seen or not inspect.isfunction(inspect.unwrap(own.get(name, None))):
            continue
        seen.add(name)
        used = code_names(own[name])
        names |= used
        left.extend(used)
    return names
