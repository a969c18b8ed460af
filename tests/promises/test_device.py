"""On a device that is not the CPU: every tensor is where it must be, and the host does not wait for the device."""

from __future__ import annotations

from collections.abc import Iterator

import device_jobs
import pytest
import torch
from kit import zoo
from kit.parity import TOLERANCE

from triton_sp.ops.dispatch import HAS_TRITON
from triton_sp.testing import RankPool

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a PyTorch with devices written in Python",
)
ASKS = "triton_sp.ranks.collectives"  # ranks compare what they have; with gloo beside NCCL that is not by the device
# Where a tower of images of unknown sizes has begun, ranks tell one another the sizes (wrappers/towers/placement.py).
IN_FORWARD = {"qwen2_5_vl": set(), "qwen3_vl": set(), "llama": set(), "llava": {ASKS}}
# One of each kind: windows and grids, DeepStack and norms of q and k, cut heads, recurrent layers.
EXACT = {
    "qwen2_5_vl": "reentrant",
    "qwen3_vl": "non_reentrant",
    "llama_28_4": "reentrant",
    "qwen3_5": "non_reentrant",
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Of processes of their own, which the device changes for good."""
    pool = RankPool(preload=["kit.parity"])
    yield pool
    pool.close()


@pytest.mark.parametrize(("name", "checkpointing"), EXACT.items())
def test_exact(ranks, name: str, checkpointing: str) -> None:
    """Also in the backward, which the engine runs in another thread there."""
    for found in ranks.run(device_jobs.step, name, checkpointing, ranks=2):
        assert found.error <= TOLERANCE[zoo.CASES[name].dtype], found


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", IN_FORWARD)
def test_launches_and_reads(ranks, name: str) -> None:
    """Kernels are given what is on the device. The host reads nothing from it once it has something to do."""
    for found in ranks.run(device_jobs.step, name, "none", True, ranks=2):
        forward, backward = (
            {module: number for module, number in reads.items() if module.startswith("triton_sp")}
            for reads in (found.forward, found.backward)
        )
        assert (forward.keys(), backward) == (IN_FORWARD[name], {ASKS: 1}), found
        assert found.told.startswith("the device"), found
