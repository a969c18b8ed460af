"""The kernels in Triton's interpreter: all of their cases in one process, whose start takes seconds."""

from pathlib import Path

import pytest
from kit.interpreter import interpret, needs_triton

CASES = ("attend_cases", "attend_properties", "bounds_cases", "check_cases", "pack_cases", "splice_cases")


@needs_triton
@pytest.mark.timeout(900)  # a minute on a core of its own
def test_kernels_in_the_interpreter() -> None:
    interpret(Path(__file__).parent, *(f"{name}.py" for name in CASES))
