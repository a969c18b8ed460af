"""`triton-sp env` says what this machine is, and what cannot be found out is said too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from triton_sp import cli, environment
from triton_sp.plan import cost


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    cost.store_link(cost.Link("measured", 1e-3, 2e9, 3e9), "cpu", 2)
    (tmp_path / "triton_sp" / "broken.json").write_text("{")
    cli.main(["env"])
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert found["torch"] == torch.__version__ and found["NCCL_DEBUG"] == "INFO"
    assert found["attention on cpu"] == "reference" and "gloo" in found["backends"]
    assert '"bandwidth": 2000000000.0' in found["link-cpu-2.json"] and "cannot be read" in found["broken.json"]
    assert "ptxas" in found["ptxas"]
    assert ("gpu 0" in found) == torch.cuda.is_available()


def test_what_a_command_prints() -> None:
    assert environment._output("echo", "yes") == "yes"
    assert environment._output("false") == "exit code 1"
    assert environment._output("no-such-command").startswith("FileNotFoundError")
