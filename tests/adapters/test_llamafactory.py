"""LLaMA-Factory, where it is installed (`make adapters` does): its command trains what it trains in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llamafactory", reason="make adapters installs it")
import commands

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_weights_after_training(tmp_path: Path) -> None:
    commands.prepare(tmp_path)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chat = {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"chat": chat}))
    example = str(commands.ROOT / "examples" / "train_llamafactory.yaml")
    moved, error = commands.compare(tmp_path, ["-m", "llamafactory.launcher", example])
    assert moved > 1, "the weights have changed"
    assert error < 1e-4
