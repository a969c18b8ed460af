"""LLaMA-Factory, where it is installed (`make adapters` does): its command trains what it trains in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llamafactory", reason="make adapters installs it")
import commands
import trl_models
from peft import LoraConfig, get_peft_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


COMMAND = ["-m", "llamafactory.launcher", str(commands.ROOT / "examples" / "train_llamafactory.yaml")]


def prepare(folder: Path, pictures: bool = False) -> None:
    commands.prepare(folder, pictures)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"} | ({"images": "images"} if pictures else {})
    chat = {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"chat": chat}))


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_after_training(tmp_path: Path, groups: int) -> None:
    """One process accumulates the gradients of the batches that two groups have at the same time."""
    prepare(tmp_path)
    alone = ("gradient_accumulation_steps=2",) if groups == 2 else ()
    moved, error = commands.compare(tmp_path, COMMAND, groups=groups, alone=alone)
    assert moved > 0.5, "the weights have changed"
    assert error < 1e-4


PICTURES = ["template=llava", "freeze_vision_tower=false", "freeze_multi_modal_projector=false"]


def test_vision_language_model(tmp_path: Path) -> None:
    """A Llava does not use the last layer of its tower: DDP has to be told, and then takes no reentrant checkpoints."""
    prepare(tmp_path, pictures=True)
    unused = ["ddp_find_unused_parameters=true", "use_reentrant_gc=false"]
    moved, error = commands.compare(tmp_path, [*COMMAND, *PICTURES, *unused])
    assert moved > 0.1, "the weights have changed"
    assert error < 1e-4


def test_adapters_in_tower_and_decoder(tmp_path: Path) -> None:
    """LoRA that goes on from an adapter, because the B of a new one is zero, and so the gradient of its A.

    With LoRA LLaMA-Factory tells DDP that all parameters are used: none are in the tower's last layer.
    """
    prepare(tmp_path, pictures=True)
    places = r".*(vision_tower.*layers\.0|language_model.*)\.(q_proj|v_proj|fc1|up_proj)"
    settings = LoraConfig(target_modules=places, r=4, init_lora_weights=False)
    get_peft_model(trl_models.vision_language_model(), settings).save_pretrained(tmp_path / "adapter")
    moved, error = commands.compare(
        tmp_path,
        [*COMMAND, *PICTURES, "finetuning_type=lora", "adapter_name_or_path=adapter", "lora_dropout=0"],
        start="adapter/adapter_model.safetensors",
        saved="out/adapter_model.safetensors",
    )
    assert moved > 0.01, "the weights have changed"
    assert error < 1e-4
