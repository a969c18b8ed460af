"""What tests share: rank processes and reference runs, each made once for the whole run."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from triton_sp.testing import RankPool

gc.set_threshold(50_000, 20)  # as in the ranks' processes


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that stay alive between tests: starting one costs seconds of imports."""
    pool = RankPool(preload=["kit.parity"])
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file with the single-process run of (case, batch)."""
    from kit import parity, zoo

    folder = tmp_path_factory.mktemp("references")

    def of(case: str, batch: str) -> Path:
        path = folder / f"{case}-{batch}.pt"
        if not path.exists():
            parity.write_reference(zoo.CASES[case], batch, path)
        return path

    return of


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    """Skip what is marked so where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch can see")
