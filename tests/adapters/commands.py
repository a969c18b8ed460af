"""The command of a trainer in one process, and by `triton-sp launch` on two ranks: what both have learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
import trl_models
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [str(ROOT), str(ROOT / "tests" / "adapters")]
ALONE = [sys.executable]
TOGETHER = [*ALONE, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "counted", "launch"]


def prepare(folder: Path) -> None:
    """What the examples read: a tiny Llama with random weights in `model`, and conversations in `chat.jsonl`."""
    trl_models.language_model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = [(trl_models.sentence(i, 4), trl_models.sentence(50 + i, 3 + 4 * (i % 5))) for i in range(24)]
    chats = [[{"role": "user", "content": x}, {"role": "assistant", "content": y}] for x, y in rows]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))


def compare(folder: Path, command: list[str], saved: str = "out", before: tuple[str, ...] = ()) -> tuple[float, float]:
    """How far the weights move in one process, and how far those of two ranks are from that, over how far they move.

    Args:
        before: what runs `command`, if it is no argument of Python.
        saved: where weights are saved.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true", "COUNTS": str(folder)}
    environment["TRITON_SP_CONFIG"] = '{"plan": "heads"}'  # two rows on two ranks need no exchange otherwise
    start, weights = load_file(folder / "model" / "model.safetensors"), []
    for runner in (ALONE, TOGETHER):
        whole = [*before, *runner, *command]
        done = subprocess.run(whole, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        weights.append(load_file(folder / saved / "model.safetensors"))
        (folder / "out").rename(folder / f"out{len(weights)}")
    assert "2 ranks share each batch" in done.stdout
    assert all(int((folder / rank).read_text()) > 0 for rank in "01"), "the work was shared out"
    alone, together = weights
    moved = {name: float((alone[name] - start[name]).norm()) for name in start}
    return max(moved.values()), max(float((together[n] - alone[n]).norm()) / moved[n] for n in start if moved[n])
