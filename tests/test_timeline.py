"""What record_step sees of a step, and that nothing of it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit import zoo

import triton_sp
from triton_sp import timeline
from triton_sp.errors import GroupError
from triton_sp.timeline import Timeline


def recorded(folder: str) -> tuple[Timeline, bool]:
    model = triton_sp.wrap(zoo.CASES["qwen2_5_vl"].model(), config=triton_sp.SPConfig(plan="heads"))
    batch = zoo.CASES["qwen2_5_vl"].batch("plain")
    before = [getattr(owner, name) for owner, name, _ in timeline.STAGES]
    with triton_sp.record_step(model, folder) as found:
        model(**batch).loss.backward()
    after = [getattr(owner, name) for owner, name, _ in timeline.STAGES]
    return found, before == after and not any(block._forward_hooks for block in model.modules())


def test_a_step(ranks, tmp_path: Path) -> None:
    """Tower of 3 layers and decoder of 2: one attention each in the forward, one in the backward, on each rank."""
    for found, clean in ranks.run(recorded, str(tmp_path), ranks=2):
        assert clean
        for rank in range(2):
            labels = [span.label for span in found.spans[rank]]
            assert [x for x in labels if x[0] in "td"] == [*(f"tower {i}" for i in range(3)), "decoder 0", "decoder 1"]
            assert labels.count("attend") == 2 * 5 and labels.count("pack") == 4 * 5
            assert found.total(rank, "attend") > 0 and found.sent[rank] > 0
            assert max(size for _, size in found.memory[rank]) > 100_000
            assert all(span.start <= span.stop for span in found.spans[rank])
        assert str(found).count("\n") == 3
    trace = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert {event["pid"] for event in trace} == {0, 1}
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def fails(folder: str) -> bool:
    """An error in the block is the caller's own, and leaves no label behind."""
    model = triton_sp.wrap(zoo.CASES["vit"].model())
    before = [getattr(owner, name) for owner, name, _ in timeline.STAGES]
    with pytest.raises(ZeroDivisionError), triton_sp.record_step(model, folder):
        _ = 1 / 0
    return before == [getattr(owner, name) for owner, name, _ in timeline.STAGES]


def test_errors(ranks, tmp_path: Path) -> None:
    assert all(ranks.run(fails, str(tmp_path), ranks=2))
    with pytest.raises(GroupError, match="call wrap first"), triton_sp.record_step(zoo.CASES["vit"].model(), tmp_path):
        pass
