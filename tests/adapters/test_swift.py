"""ms-swift, where it is installed (`make adapters` does): its command trains what it trains in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("swift", reason="make adapters installs it")
import commands

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_weights_after_training(tmp_path: Path) -> None:
    commands.prepare(tmp_path)
    example = str(commands.ROOT / "examples" / "train_swift.sh")
    moved, error = commands.compare(tmp_path, [], ("sh", example), saved="out/checkpoint-3/model.safetensors")
    assert moved > 1, "the weights have changed"
    assert error < 1e-4
