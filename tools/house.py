"""Measures of the library's source, held to limits: `python -m tools.house`, a step of `make check`.

They keep files and functions small enough to be read, and the modules in one order. Complexity is radon's: branches,
loops, boolean operators and comprehensions of a function, and 1. Imports are grimp's, see tools.imports.
"""

from __future__ import annotations

import ast
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from radon.complexity import cc_visit

from tools import imports

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("attention_forward", "_sharded_sdpa")  # functions whose signature is transformers' or torch's
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measure(NamedTuple):
    """One number about the source, the limit that it is held to, and the place where it is worst."""

    name: str
    found: float
    limit: float
    where: str = ""
    least: bool = False  # whether the limit is the least, not the most, that is allowed

    @property
    def holds(self) -> bool:
        """Whether the number is inside of its limit."""
        return self.found >= self.limit if self.least else self.found <= self.limit


def measures() -> list[Measure]:
    """All measures of the library in this checkout."""
    files = sorted((ROOT / "triton_sp").rglob("*.py"))
    plain = [
        file for file in files if "kernels" not in file.relative_to(ROOT).parts
    ]  # a kernel is one long function by nature
    lengths = [(file.read_text().count("\n"), file.name) for file in files]
    defined = [(f, f"{file.name}:{f.lineno} {f.name}") for file in files for f in functions(file)]
    bodies = [(body_lines(f), f"{file.name}:{f.lineno} {f.name}") for file in plain for f in functions(file)]
    counts = [(parameters(f), f"{file.name}:{f.lineno} {f.name}") for file in plain for f in functions(file)]
    named = [item for file in files for item in public_names(file)]
    untyped = [where for function, where in defined if not is_typed(function)]
    bare = [where for done, where in named if not done]
    return [
        Measure("lines of all files", sum(count for count, _ in lengths), math.inf),
        Measure("lines of the median file", statistics.median(count for count, _ in lengths if count > 1), 140),
        Measure("lines of the longest file", *worst(lengths, 330)),
        Measure("lines of the longest body outside kernels", *worst(bodies, 50)),
        Measure("complexity", *worst([item for file in files for item in complexities(file)], 15)),
        Measure("parameters outside kernels", *worst(counts, 8)),
        Measure("% of functions fully typed", 100 - 100 * len(untyped) / len(defined), 100, listed(untyped), True),
        Measure("% of public names with a docstring", 100 - 100 * len(bare) / len(named), 97, listed(bare), True),
        Measure(f"imports between {len(imports.rooms())} rooms", len(imports.arrows()), 96),
    ]


def worst(counted: list[tuple[int, str]], limit: float) -> tuple[int, float, str]:
    """The largest of numbers with their places, as `Measure` takes it."""
    found, where = max(counted)
    return found, limit, where


def listed(places: list[str]) -> str:
    """Some of many places."""
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def functions(file: Path) -> list[Function]:
    """All functions of a file, also those inside of others."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function)]


def body_lines(function: Function) -> int:
    """The lines of a function's body, without its docstring.

    >>> body_lines(ast.parse('def f():\\n    "Says nothing."\\n    a = 1\\n    return a').body[0])
    2
    """
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def complexities(file: Path) -> list[tuple[int, str]]:
    """The complexity of every function and method of a file."""
    blocks = cc_visit(file.read_text())
    return [(block.complexity, f"{file.name}:{block.lineno} {block.name}") for block in blocks if block.letter != "C"]


def parameters(function: Function) -> int:
    """How many parameters a function has; 0 where the signature is that of another library."""
    given = function.args
    return 0 if function.name in FOREIGN else len(given.posonlyargs + given.args + given.kwonlyargs)


def is_typed(function: Function) -> bool:
    """Whether every parameter but self, cls and ctx, and the result, are annotated; of a kernel, all its constants.

    All else that a kernel takes is a `tl.tensor`, be it a pointer, a number or a tile, so that naming the type says
    nothing. Its constants are upper case, and `tl.constexpr` has a meaning to the compiler.

    >>> [is_typed(f) for f in ast.parse("def f(x: int) -> int: ...\\ndef g(self) -> int: ...\\ndef h(x): ...").body]
    [True, True, False]
    >>> [is_typed(f) for f in ast.parse("@jit\\ndef f(x, D: constexpr): ...\\n@jit\\ndef g(x, D): ...").body]
    [True, False]
    """
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    named = [argument for argument in every if argument and argument.arg not in ("self", "cls", "ctx")]
    if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return all(argument.annotation for argument in named if argument.arg.isupper())
    return function.returns is not None and all(argument.annotation for argument in named)


def public_names(file: Path) -> Iterator[tuple[bool, str]]:
    """Whether there is a docstring, and the name, of a module, its public classes and functions, and their methods."""
    owners: list[tuple[str, ast.Module | ast.ClassDef]] = [(file.name, ast.parse(file.read_text()))]
    yield ast.get_docstring(owners[0][1]) is not None, file.name
    for prefix, owner in owners:
        for node in owner.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            if any(getattr(decorator, "id", "") == "overload" for decorator in node.decorator_list):
                continue
            yield ast.get_docstring(node) is not None, f"{prefix} {node.name}"
            if isinstance(node, ast.ClassDef):
                owners.append((f"{prefix} {node.name}", node))


def main() -> int:
    """Print all measures; how many are outside of their limits."""
    found = measures()
    for measure in found:
        sign, bound = ("" if measure.holds else "  <-- outside"), "at least" if measure.least else "at most"
        limit = "" if math.isinf(measure.limit) else f"{bound} {measure.limit}"
        print(f"{measure.name:45} {measure.found:>8.6g}  {limit:13} {measure.where}{sign}")
    return sum(not measure.holds for measure in found)


if __name__ == "__main__":
    sys.exit(main())
