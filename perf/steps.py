"""The steps of `make gpu`, the most telling first, each with what it runs on a GPU and how it is rehearsed on a CPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

PYTHON = sys.executable
FOLDER = "tests/kernels/"
CASES = [FOLDER + name for name in ("attend_cases.py", "check_cases.py", "pack_cases.py", "splice_cases.py")]
BOUNDS = FOLDER + "bounds_cases.py"
PARITY = "tests/promises/test_gpu.py"
# bf16 at the head dims that models use first: fp32 takes the compiler longest, and no model is trained in it.
FIRST = [
    *(f"head_dims[{dim}-bfloat16" for dim in (72, 80, 128, 64)),
    *("test_masks", "nan", "strides", "lse", "key_ranges", "graph", "keys_left_out", "empty"),
    *("pack_cases", "splice_cases", "check_cases"),
]
OTHER_DTYPES = ["-float32", "-float16", "torch.float32", "torch.float16"]
LARGE = "more_than_two_to_the_31"
INTERPRET = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
# Tests say themselves what is wrong, and portable kernels are proven as such, whatever was recorded of the Gluon tier.
UNCHECKED = {"TRITON_SP_SELF_CHECK": "0", "TRITON_SP_GLUON": "0"}


@dataclass(frozen=True)
class Step:
    """A command in a process group of its own.

    Attributes:
        seconds: its limit, at which the whole group is killed.
        test: whether its failure is the failure of the run.
        again: if it fails, it runs once more with another assembler, see gpu.py.
        environment: what is set for it alone.
    """

    name: str
    command: Sequence[str]
    seconds: float
    test: bool = False
    again: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def run_tests(name: str, files: Sequence[str], **words: Sequence[str]) -> Step:
    """A step that runs test files, with or without pytest; `words` as perf.testrun takes them."""
    options = [x for option, found in words.items() for word in found for x in (f"--{option}", word)]
    return Step(name, [PYTHON, "-m", "perf.testrun", "--step", name, *options, *files], 60, True, False, UNCHECKED)


def module(name: str, program: str, seconds: float, *arguments: str) -> Step:
    """A step that runs a module of this folder."""
    return Step(name, [PYTHON, "-m", f"perf.{program}", *arguments], seconds)


def sweep(name: str, of: str, seconds: float, *more: str) -> Step:
    """A step that runs a sweep, which begins no case after 9/10 of its time."""
    return module(name, "sweep", seconds, of, "--device", "cuda", "--budget", f"{0.9 * seconds:.0f}", *more)


def steps() -> list[Step]:
    """On a GPU. What is not installed on the machine has no step."""
    found = [
        replace(module("preflight", "preflight", 20), test=True),
        module("prewarm", "prewarm", 30, "72", "80", "128", "64"),
        replace(run_tests("bf16 first", CASES, first=FIRST, only=FIRST, without=[*OTHER_DTYPES, LARGE]), again=True),
        replace(module("self-checks", "selfcheck", 45), test=True),
        sweep("headline", "kernels", 100, "--part", "headline"),
        sweep("packs", "kernels", 30, "--part", "packs"),
        sweep("end to end", "end_to_end", 90),
        module("narrow products", "narrow_products", 20),
        replace(module("tune", "tune", 45, "--few", "72", "128"), environment=UNCHECKED),
        replace(run_tests("parity of two processes", [PARITY], only=["parity"]), environment={}),
        replace(run_tests("tests on gluon", CASES[:1], only=["gluon"]), seconds=30, environment={}),
        replace(run_tests("large tensors", CASES, only=[LARGE]), seconds=25),
        sweep("FlexAttention", "kernels", 50, "--part", "headline", "--slow"),
        sweep("single rank", "single_rank", 50),
        replace(
            run_tests(
                "the other tests", [*CASES, FOLDER + "bounds_cases.py"], after=["bf16 first"], without=["gluon", LARGE]
            ),
            seconds=90,
        ),
    ]
    if importlib.util.find_spec("hypothesis"):
        found.append(run_tests("properties", [FOLDER + "attend_properties.py"]))
    if sanitizer := shutil.which("compute-sanitizer"):
        # Evidence only: on wgmma it reports what is none (NVIDIA/compute-sanitizer-samples issue 19).
        step = run_tests("memcheck", CASES[:1], only=["test_empty_and_whole_tiles"])
        command = [sanitizer, "--tool=memcheck", "--error-exitcode=9", *step.command]
        found.append(replace(step, command=command, seconds=40, test=False))
    return [*found, sweep("the rest", "kernels", 3600, "--part", "rest")]


def rehearsal() -> list[Step]:
    """The same steps in small on a CPU: kernels in Triton's interpreter, everything else as it is. All of them, with
    what may not be installed on a GPU machine."""

    def small(name: str, only: str, files: Sequence[str] = CASES) -> Step:
        return replace(run_tests(name, files, only=[only]), environment=UNCHECKED | INTERPRET)

    def quick(name: str, of: str, *more: str) -> Step:
        return module(name, "sweep", 300, of, "--device", "cpu", "--quick", *more)

    found = [
        replace(module("preflight", "preflight", 60), environment=INTERPRET),
        module("prewarm", "prewarm", 300, "72"),
        replace(small("bf16 first", "test_empty"), again=True),
        replace(module("self-checks", "selfcheck", 120), environment=INTERPRET, test=True),
        quick("headline", "kernels", "--part", "headline"),
        quick("packs", "kernels", "--part", "packs"),
        quick("end to end", "end_to_end"),
        replace(module("narrow products", "narrow_products", 60, "--device", "cpu"), environment=INTERPRET),
        replace(module("tune", "tune", 300, "--few", "--device", "cpu", "64"), environment=INTERPRET),
        replace(small("parity of two processes", "on_cpu", [PARITY]), environment={}),
        small("tests on gluon", "gluon", CASES[:1]),
        small("large tensors", LARGE),
        quick("FlexAttention", "kernels", "--part", "headline", "--slow"),
        quick("single rank", "single_rank"),
        small("the other tests", "test_gradient_of_lse_alone"),
        small("properties", "test_properties", [FOLDER + "attend_properties.py"]),
        replace(small("memcheck", "test_what_no_kernel_does_raises", CASES[:1]), test=False),
        quick("the rest", "kernels", "--part", "rest"),
    ]
    return [replace(step, seconds=300) for step in found]
