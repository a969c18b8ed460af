"""Scripts that cannot be edited: a Trainer that is not told of triton_sp trains on groups of ranks all the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trainer_jobs
from kit import zoo
from kit.parity import weights_error

from triton_sp import SPConfig, cli, launch
from triton_sp.errors import GroupError, InputError
from triton_sp.ranks import groups
from triton_sp.testing import RankError
from triton_sp.wrappers.install import installation_of


def train(size: int | None) -> tuple[float, int]:
    """The relative error of the weights, and how many ranks share a batch."""
    from transformers import Trainer, TrainingArguments

    model, data = zoo.CASES["llava"].model(torch.float32), trainer_jobs.samples(4)
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    trainer_jobs.by_hand(reference, data, 1, dist.get_world_size() // (size or dist.get_world_size()))
    options: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo", "report_to": [], "save_strategy": "no"}
    options |= {"max_grad_norm": 0, "optim": "sgd", "lr_scheduler_type": "constant", "disable_tqdm": True}
    with trainer_jobs.as_torchrun(), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=trainer_jobs.ACCUMULATION,
            num_train_epochs=trainer_jobs.EPOCHS,
            learning_rate=trainer_jobs.RATE,
            ddp_find_unused_parameters=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = Trainer(model, arguments, trainer_jobs.collate, train_dataset=data)
        original = Trainer.train
        with launch.wrapped_trainers(size, SPConfig()):
            trainer.train()
        assert Trainer.train is original
    installation = installation_of(model)
    return weights_error(model.state_dict(), reference, before), installation.group.size if installation else 0


@pytest.mark.parametrize("ranks_and_size", [(2, None), pytest.param((4, 2), marks=pytest.mark.long)])
def test_weights(ranks, ranks_and_size: tuple[int, int | None]) -> None:
    number, size = ranks_and_size
    for error, shared in ranks.run(train, size, ranks=number):
        assert error < 1e-4 and shared == 2


def test_sizes(ranks) -> None:
    assert ranks.run(groups.neighbours, None, ranks=2) == [None, None]
    with pytest.raises(RankError, match="a size that divides the 2 ranks, found 3") as raised:
        ranks.run(groups.neighbours, 3, ranks=2)
    assert all(isinstance(error, GroupError) for error in raised.value.errors.values())


SCRIPT = """
import json, os, sys
from transformers import Trainer
json.dump([sys.argv, __name__, Trainer.train.__wrapped__.__name__], open(os.environ["OUT"], "w"))
"""


def test_command(tmp_path: Path, monkeypatch) -> None:
    """The script runs as if by itself, with its own arguments, on the ranks that are there."""
    script, out = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "OUT": str(out), "TRITON_SP_CONFIG": '{"chunks": 2}'}
    command = [sys.executable, "-m", "triton_sp.cli", "launch", str(script), "--lr", "1", "-v"]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert json.loads(out.read_text()) == [[str(script), "--lr", "1", "-v"], "__main__", "train"]


@pytest.mark.parametrize("script", [["train.py"], ["-m", "package.train"]])
def test_arguments(monkeypatch, script: list[str]) -> None:
    """None is taken for one of ours."""
    ran: list[Any] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch, "run", ran.append)
    cli.main(["launch", *script, "--ranks", "1", "-v"])
    assert ran == [[*script, "--ranks", "1", "-v"]]


@pytest.mark.parametrize(
    ("size", "config", "field"),
    [
        ("four", "{}", "TRITON_SP_SIZE"),
        ("2", "{", "TRITON_SP_CONFIG"),
        ("2", '{"chunk": 2}', "TRITON_SP_CONFIG"),
        ("2", '{"chunks": 0}', "SPConfig.chunks"),
    ],
)
def test_environment(monkeypatch, size: str, config: str, field: str) -> None:
    monkeypatch.setenv("TRITON_SP_SIZE", size)
    monkeypatch.setenv("TRITON_SP_CONFIG", config)
    with pytest.raises(InputError) as raised:
        launch.run(["train.py"])
    assert raised.value.field == field


def test_missing_script() -> None:
    with pytest.raises(InputError, match="a script, or an installed command, found nothing-here"):
        launch.run(["nothing-here"])
