"""Which small changes of the source the tests notice: `make mutants`.

The changes are cosmic-ray's: one operator, number, condition, decorator or loop is another one. Of each module a seeded
sample is tried, each in a process of its own that runs the tests of that module in a copy of the checkout. cosmic-ray
itself starts Python for each mutant, and imports of PyTorch would take most of the time; here they are done once, and
processes are forked. reports/mutants.csv names every mutant that was tried; tests/data/mutants.csv counts them, and
tests/data/mutants_equivalent.csv says why some cannot be noticed: they change no result.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mutants.table import COUNTS, DOCUMENT, EQUIVALENT, MODULES, Count, written

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "reports" / "mutants.csv"
FOREIGN = ("torch", "triton", "sympy", "mpmath", "transformers", "numpy", "accelerate", "peft")  # imported once
OPTIONS = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist")
EXAMPLES = ("--doctest-modules", "--import-mode=importlib", "-o", "consider_namespace_packages=true")
COPIED = ("triton_sp", "tests", "tools", "perf", "docs", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """A change of one place: the first line that differs, and the whole source with it."""

    operator: str
    line: int
    before: str
    after: str
    source: str


class Limit(NamedTuple):
    """How long tests may take, and how much of the processor's time; a mutant may loop for ever, or wait."""

    seconds: float
    cpu: float


class Tree:
    """A copy of the checkout, in which processes run tests."""

    def __init__(self, place: Path) -> None:
        self.place = place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, place / name)

    def put(self, module: str, source: str) -> None:
        """Replace a module, and forget what Python has compiled of it."""
        file = self.place / module
        file.write_text(source)
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()

    def run(self, module: str, limit: Limit) -> tuple[str, Limit]:
        """Run a module's tests in a new process: "passed", "failed" or "timeout", and what it took."""
        start = time.monotonic()
        child = os.fork()
        if not child:
            _run_tests(self.place, module, MODULES[module], limit)
        while time.monotonic() < start + limit.seconds:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                _end(child)  # processes of ranks that it left behind
                verdict = "passed" if status == 0 else "failed"
                return verdict, Limit(time.monotonic() - start, used.ru_utime + used.ru_stime)
            time.sleep(0.02)
        _end(child)
        os.waitpid(child, 0)
        return "timeout", limit


def _end(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def _run_tests(place: Path, module: str, tests: list[str], limit: Limit) -> None:
    """In a new process: run a module's examples and its tests in a copy of the checkout, and end."""
    code = 3
    try:
        os.setsid()
        os.chdir(place)
        output = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit.cpu) + 1, int(limit.cpu) + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # a mutant may ask for any amount
        ours = ("", str(ROOT), str(ROOT / "tests"))
        sys.dont_write_bytecode = False  # or each process would compile the library anew
        sys.path[:] = [str(place), *(path for path in sys.path if path not in ours)]
        os.environ["PYTHONPATH"] = str(place)
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: fork  # ranks too are forked, with all that is imported
        import hypothesis
        import pytest

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants",
            derandomize=True,
            database=None,
            phases=phases,
            max_examples=40,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.settings.load_profile("mutants")
        code = int(pytest.main([*OPTIONS, *EXAMPLES, module]))
        if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            code = int(pytest.main([*OPTIONS, *tests]))
        (place / "modules").write_text("\n".join(sys.modules))
    finally:
        os._exit(code)


# --- mutants -------------------------------------------------------------------------------------------------------


def positions(source: str) -> list[tuple[Any, int]]:
    """All changes that cosmic-ray can make: an operator, and which of the places where it applies."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes, found = list(ast_nodes(get_ast(source))), []
    for name in sorted(plugins.operator_names()):
        operator = plugins.get_operator(name)
        if not operator.arguments():  # else it wants to be told what to replace
            count = sum(len(list(operator().mutation_positions(node))) for node in nodes)
            found += [(operator, occurrence) for occurrence in range(count)]
    return found


def draw(source: str, places: list[tuple[Any, int]], sample: int, generator: random.Random) -> Iterator[Mutant]:
    """A sample of mutants, without those that change annotations only or what another one changes."""
    from cosmic_ray.mutating import mutate_code

    seen = {_meaning(source)}
    for operator, occurrence in generator.sample(places, len(places)):
        changed = mutate_code(source, operator(), occurrence)
        meaning = _meaning(changed or source)
        if meaning not in seen and len(seen) <= sample:
            seen.add(meaning)
            yield _mutant(operator.__name__, source, changed)
        elif len(seen) > sample:
            return


def _mutant(operator: str, source: str, changed: str) -> Mutant:
    pairs = itertools.zip_longest(source.splitlines(), changed.splitlines(), fillvalue="")
    line, before, after = next((n, a, b) for n, (a, b) in enumerate(pairs, 1) if a != b)
    return Mutant(operator, line, before.strip(), after.strip(), changed)


class _WithoutAnnotations(ast.NodeTransformer):
    """They are texts at run time, and docstrings too."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node


def _meaning(source: str) -> str:
    try:
        return ast.dump(_WithoutAnnotations().visit(ast.parse(source)))
    except SyntaxError:
        return _meaning("")


# --- the command ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the report: a mutant and what came of it."""

    module: str
    line: int
    operator: str
    before: str
    after: str
    verdict: str
    outcome: str


def examine(tree: Tree, module: str, mutants: Iterator[Mutant]) -> Iterator[Row]:
    """Try mutants of a module, and print those that no test noticed."""
    known = {(module, before, after) for module, before, after, _ in EQUIVALENT.rows()}
    outcome, _ = tree.run(module, Limit(900, 900))
    if outcome != "passed":
        raise SystemExit(f"{module}: its tests fail without any change: {tree.place / 'log'}")
    for name in (tree.place / "modules").read_text().split():
        if name.split(".")[0] in FOREIGN and name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:
                continue  # what cannot be imported by itself is imported with the tests, more slowly
    _, usual = tree.run(module, Limit(900, 900))
    for mutant in mutants:
        tree.put(module, mutant.source)
        outcome, _ = tree.run(module, Limit(15 * usual.seconds + 60, 6 * usual.cpu + 10))
        verdict = "killed" if outcome != "passed" else "survived"
        if verdict == "survived" and (module, mutant.before, mutant.after) in known:
            verdict = "equivalent"
        yield Row(module, mutant.line, mutant.operator, mutant.before, mutant.after, verdict, outcome)
        if verdict == "survived":
            print(f"{module}:{mutant.line} {mutant.operator}\n  - {mutant.before}\n  + {mutant.after}", flush=True)


def main() -> None:
    """Examine modules, and write the report, the counts and the table of docs/proof.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(MODULES)}; all if none is named")
    parser.add_argument("--sample", type=int, default=80, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("torch", "torch.distributed", "numpy", "pytest", "hypothesis"):
        importlib.import_module(name)
    REPORT.parent.mkdir(exist_ok=True)
    if not arguments.modules:
        REPORT.unlink(missing_ok=True)
    for module in arguments.modules or list(MODULES):
        tree, source = Tree(ROOT / "build" / "mutants" / module.replace("/", "-")), (ROOT / module).read_text()
        places, verdicts = positions(source), []
        tried = draw(source, places, arguments.sample, random.Random(f"{module} {arguments.seed}"))
        for row in examine(tree, module, tried):  # written one by one, so that nothing is lost if this is interrupted
            verdicts.append(row.verdict)
            with REPORT.open("a", newline="") as file:
                csv.writer(file).writerow(row)
        count = Count(module, len(places), len(verdicts), verdicts.count("killed"), verdicts.count("equivalent"))
        print(f"{module}: {count.killed} of {count.sampled - count.equivalent} killed, {count.share:.1%}", flush=True)
        COUNTS.put(count)
        shutil.rmtree(tree.place)
    DOCUMENT.write_text(written(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
