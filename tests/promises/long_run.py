"""2,000 steps of AdamW on 2 ranks beside one process, in float32 and under bf16 autocast: `make long-run`.

Training is chaotic: a difference in the last bit grows from step to step in any two runs that round differently. So the
yardstick is one process against itself, rounded otherwise: with another implementation of attention in the same model.
The curves of 2 ranks must be as near to those of one process as that. And 2 ranks must be bit for bit the same in a
second run.

The task can be learnt: each word follows from the one before by a rule that a picture shows. Every step has new data.

There are eight trainings. What each has found is kept in build/long_run until all are done, so that the command goes on
where it stopped, unless the source has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import triton_sp
from triton_sp import SPConfig
from triton_sp.testing import RankPool

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "long_run"
SOURCES = [*sorted((ROOT / "triton_sp").rglob("*.py")), Path(__file__)]
SOURCE = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES)).hexdigest()[:12]
TABLE, FIGURE = ROOT / "tests" / "data" / "long_run.csv", ROOT / "docs" / "figures" / "long_run.png"
STEPS, WINDOW, RATE = 2000, 50, 1e-3
IMAGE, SIDE, PATCH, TEXT, WORDS, RULES = 1, 12, 4, 17, 29, 4
DTYPES = {"float32": None, "bf16 autocast": torch.bfloat16}


class Run(NamedTuple):
    """The loss of each step, and digests of the weights after every 100 of them."""

    losses: list[float]
    digests: list[str]


def model(attention: str) -> nn.Module:
    """A LLaVA of one block in the tower and one in the decoder."""
    torch.manual_seed(0)
    stack = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **stack)
    text = LlamaConfig(vocab_size=2 + WORDS, num_key_value_heads=2, use_cache=False, **stack)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).train()


def batch(step: int) -> dict[str, Tensor]:
    """Four rows: a picture, which is brighter the larger the rule's number is, and words that keep to the rule."""
    generator = torch.Generator().manual_seed(step)
    rules = torch.randint(RULES, (4,), generator=generator)
    pixels = rules[:, None, None, None] - 1.5 + 0.3 * torch.randn(4, 3, SIDE, SIDE, generator=generator)
    words = [torch.randint(WORDS, (4,), generator=generator)]
    for _ in range(TEXT - 1):
        words.append((3 * words[-1] + 1 + 5 * rules) % WORDS)
    text = 2 + torch.stack(words, 1)
    images = torch.full((4, (SIDE // PATCH) ** 2), IMAGE)
    labels = torch.cat([torch.full_like(images, -100), text], 1)
    return {"input_ids": torch.cat([images, text], 1), "labels": labels, "pixel_values": pixels}


def trained(steps: int, dtype: torch.dtype | None, attention: str = "sdpa") -> Iterator[tuple[float, str]]:
    """Train on this rank of the default group, or in one process if there is none. Of each step, its loss; and after
    every 100 of them the digest of the weights."""
    torch.set_num_threads(1)
    llava = model(attention)
    if dist.is_initialized():
        triton_sp.wrap(llava, config=SPConfig(plan="heads"))
    optimizer = torch.optim.AdamW(llava.parameters(), lr=RATE, fused=True)
    for step in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = llava(**batch(step)).loss
        loss.backward()
        if dist.is_initialized():
            triton_sp.sync_gradients(llava)
        optimizer.step()
        optimizer.zero_grad()
        weights = (p.detach().numpy().tobytes() for p in llava.parameters())
        yield float(loss.detach()), "" if (step + 1) % 100 else hashlib.sha256(b"".join(weights)).hexdigest()


def train(steps: int, dtype: torch.dtype | None, attention: str = "sdpa") -> Run:
    """All steps of a training."""
    losses, digests = zip(*trained(steps, dtype, attention), strict=True)
    return Run(list(losses), [digest for digest in digests if digest])


def kept(name: str, run: Callable[[], list[Run]]) -> list[Run]:
    """The runs of a training that was finished before, by the same source; else they are made now."""
    file = KEPT / SOURCE / f"{name}.json"
    if not file.exists():
        runs = run()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(runs))
        print(f"{name}: done, the last loss is {runs[0].losses[-1]:.4f}", flush=True)
    return [Run(*found) for found in json.loads(file.read_text())]


def compare(steps: int, pool: RankPool, name: str) -> pd.DataFrame:
    """The losses of one process, of one process with other rounding, and of 2 ranks, which were run twice."""
    dtype, title = DTYPES[name], f"{steps} steps in {name}"

    def together() -> list[Run]:
        return pool.run(train, steps, dtype, ranks=2, timeout=36000)

    first, again = (kept(f"{title}, 2 ranks, {time} time", together) for time in ("first", "second"))
    assert first == again, f"{name}: two runs on 2 ranks differ"
    assert first[0] == first[1], f"{name}: the ranks differ"
    (alone,), (other,) = (
        kept(f"{title}, {attention}", lambda attention=attention: [train(steps, dtype, attention)])
        for attention in ("sdpa", "eager")
    )
    columns = {"one": alone.losses, "rounded": other.losses, "ranks": first[0].losses}
    return pd.DataFrame({"dtype": name, "step": range(1, steps + 1), **columns})


def distances(rows: pd.DataFrame, window: int = WINDOW) -> pd.DataFrame:
    """The mean of each window of steps: the loss of one process, and how far the two other runs are from it."""
    away = {name: (rows[name] - rows["one"]).abs() for name in ("rounded", "ranks")}
    table = pd.DataFrame({"dtype": rows["dtype"], "step": rows["step"], "loss": rows["one"], **away})
    table["step"] = (table["step"] - 1) // window * window + window
    return table.groupby(["dtype", "step"], sort=False).mean().reset_index()


def plot(rows: pd.DataFrame, path: Path) -> None:
    """The curves above, their distances below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for column, (name, part) in zip(axes.T, rows.groupby("dtype", sort=False), strict=True):
        means = part.groupby((part["step"] - 1) // 10).mean(numeric_only=True)
        column[0].plot(means["step"], means["one"], label="one process", linewidth=2.5, color="0.7")
        column[0].plot(means["step"], means["ranks"], label="2 ranks", linewidth=0.8, color="C0")
        column[0].set(title=name, ylabel="loss")
        away = distances(part, 10)
        smallest = 1e-9  # equal losses have no logarithm
        column[1].plot(
            away["step"], away["ranks"] + smallest, label="2 ranks and one process", color="C0", linewidth=0.8
        )
        label = "one process and itself, rounded otherwise"
        column[1].plot(away["step"], away["rounded"] + smallest, label=label, color="C1", linewidth=0.8)
        column[1].set(yscale="log", xlabel="step", ylabel="difference of the losses")
    for axis in axes[:, 0]:
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, compare, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    pool = RankPool()
    rows = pd.concat([compare(steps, pool, name) for name in DTYPES])
    pool.close()
    print(distances(rows).to_string())
    if steps == STEPS:
        rows.to_csv(TABLE, index=False, float_format="%.8g")
        plot(rows, FIGURE)
    check(rows)
    shutil.rmtree(KEPT)


def check(rows: pd.DataFrame) -> None:
    """2 ranks are as near to one process as one process with other rounding is: over all steps, and in the worst
    window; and the task was learnt."""
    for name, part in rows.groupby("dtype", sort=False):
        away = distances(part)
        for measure in (np.mean, np.max):
            found, allowed = measure(away["ranks"]), measure(away["rounded"])
            assert found <= 2 * allowed + 1e-6, (name, measure.__name__, found, allowed)
        assert away["loss"].iloc[-1] < away["loss"].iloc[0] / 2 or len(part) < STEPS, (name, away["loss"].iloc[-1])


if __name__ == "__main__":
    main()
