"""Calibration: every rank comes to the same link, and the planner finds what was stored."""

from __future__ import annotations

import torch

from triton_sp import cli
from triton_sp.plan import cost
from triton_sp.plan.calibrate import measure_link
from triton_sp.ranks import groups


def measured() -> cost.Link:
    return measure_link(groups.resolve_group(), torch.device("cpu"), large=1 << 12)


def test_ranks_agree(ranks) -> None:
    links = ranks.run(measured, ranks=2)
    assert links[0] == links[1]
    assert links[0].latency > 0 and links[0].bandwidth > 0 and links[0].compute > 0


def test_command(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.main(["calibrate", "--ranks", "2"])
    assert "2 ranks on cpu" in capfd.readouterr().out
    assert cost.find_link("auto", "cpu", 2).name == "calibrated cpu"
