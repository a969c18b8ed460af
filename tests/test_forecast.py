"""`triton-sp plan` is held to what real ranks save and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import zoo

import triton_sp
from triton_sp import cli
from triton_sp.errors import InputError
from triton_sp.forecast import Forecast, Job, forecast, make_batch
from triton_sp.ranks import collectives
from triton_sp.testing import saved_activations
from triton_sp.wrappers.install import installation_of

JOBS = {
    "llama": Job(gpus=2, text=301),
    "qwen2_5_vl": Job(gpus=2, text=61, images=2, height=48, width=80),
    "llama, checkpointed": Job(gpus=2, text=301, checkpointing=True),
}


def real(name: str) -> tuple[int, int, dict[str, str], int]:
    """Bytes that a rank has saved and sent in a forward, the plans, and its tokens."""
    job, config = JOBS[name], triton_sp.SPConfig(link="nvlink", check="off")
    model: Any = zoo.CASES[name.split(",")[0]].model(torch.float32)
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    batch = {key: x.float() if x.is_floating_point() else x for key, x in make_batch(model, job).items()}
    triton_sp.wrap(model, config=config)
    with saved_activations(model) as saved, collectives.record() as ledger:
        loss = model(**batch).loss
    assert torch.isfinite(loss.detach())
    calls = installation_of(model).last_calls
    plans = {part: call.choice.plan for part, call in calls.items()}
    return saved[0], ledger.bytes, plans, calls[list(calls)[-1]].choice.shards.sizes[0]


def planned(name: str) -> Forecast:
    model = zoo.CASES[name.split(",")[0]].model(torch.float32)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    (row,) = forecast(model, JOBS[name], [2])
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    return row


@pytest.mark.parametrize("name", JOBS)
def test_as_in_a_real_run(ranks, name: str) -> None:
    saved, sent, plans, tokens = ranks.run(real, name, ranks=2)[0]
    row = planned(name)
    assert (row.sent, row.plans, row.own_tokens) == (sent, plans, tokens)
    assert abs(row.activations / saved - 1) < 0.05


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.CASES["llama"].model().config.save_pretrained(tmp_path)
    options = [str(tmp_path), "--gpus", "4", "--text", "1k", "--engine", "zero3"]
    cli.main(["plan", *options, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in rows] == [1, 2, 4] and [row["own_tokens"] for row in rows] == [1024, 512, 256]
    assert rows[2]["activations"] < 0.3 * rows[0]["activations"] and rows[0]["sent"] == 0 < rows[1]["sent"]
    cli.main(["plan", *options, "--gpu-memory", "80"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("fits") and len(lines) == 3 and all(line.endswith("yes") for line in lines)


def test_images_that_are_not_planned() -> None:
    with pytest.raises(InputError, match="images"):
        forecast(zoo.CASES["llava"].model(), Job(gpus=2, text=9, images=1, height=24, width=24), [2])
