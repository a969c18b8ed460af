"""The command of a trainer in one process, and by `triton-sp launch` on two ranks: what both have learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import trl_models
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [str(ROOT), str(ROOT / "tests" / "adapters")]


def prepare(folder: Path, pictures: bool = False) -> None:
    """What the examples read: a tiny model with random weights in `model`, and conversations in `chat.jsonl`.

    Args:
        pictures: a Llava and a picture in each conversation, instead of a Llama.
    """
    model = trl_models.vision_language_model() if pictures else trl_models.language_model()
    model.save_pretrained(folder / "model")
    (tiny.processor() if pictures else tiny.tokenizer()).save_pretrained(folder / "model")
    lines = []
    for i in range(24):
        question, answer = trl_models.sentence(i, 4), trl_models.sentence(50 + i, 3 + 4 * (i % 5))
        question = f"<image> {question}" if pictures else question
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        line: dict[str, Any] = {"messages": chat}
        if pictures:
            line["images"] = [str(folder / f"{i}.png")]
            tiny.photograph(i).save(line["images"][0])
        lines.append(json.dumps(line))
    (folder / "chat.jsonl").write_text("\n".join(lines))


def compare(
    folder: Path,
    command: list[str],
    before: tuple[str, ...] = (),
    start: str = "model/model.safetensors",
    saved: str = "out/model.safetensors",
    groups: int = 1,
    alone: tuple[str, ...] = (),
) -> tuple[float, float]:
    """How far the weights move in one process, and how far those of two ranks are from that, over how far they move.

    Args:
        before: what runs `command`, if it is no argument of Python.
        start: where weights are before training.
        saved: where they are saved.
        groups: of two ranks each.
        alone: arguments of one process: it takes the batches of all groups.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true", "COUNTS": str(folder)}
    environment |= {"TRITON_SP_SIZE": "2", "TRITON_SP_CONFIG": '{"plan": "heads"}'}  # else two rows need no exchange
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={2 * groups}"]
    first, weights = load_file(folder / start), []
    for runner, more in (([], alone), ([*together, "-m", "counted", "launch"], ())):
        whole = [*before, sys.executable, *runner, *command, *more]
        done = subprocess.run(whole, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        weights.append(load_file(folder / saved))
        (folder / "out").rename(folder / f"out{len(weights)}")
    assert "2 ranks share each batch" in done.stdout
    assert all(int((folder / str(rank)).read_text()) > 0 for rank in range(2 * groups)), "the work was shared out"
    one, many = weights
    moved = {name: float((one[name] - first[name]).norm()) for name in first}
    return max(moved.values()), max(float((many[n] - one[n]).norm()) / moved[n] for n in first if moved[n])
