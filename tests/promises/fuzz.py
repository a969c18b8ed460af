"""Many small steps of all kinds, one after another: `python fuzz.py 10000` (make soak).

Each has 0 to 8 images and 1 to 1000 tokens in 1 to 3 rows, padded or not, with labels or without. Ranks compare
their losses, and now and then one step with the model in one process. Memory must not grow.
"""

from __future__ import annotations

import copy
import resource
import sys
from dataclasses import dataclass

import torch
from kit import parity, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.testing import RankPool, relative_error

COMPARED = 50  # a step in so many is compared with one process
WARM = 200  # steps after which memory must not grow any more


@dataclass(frozen=True)
class Fuzzed:
    """What came of a run: the worst relative errors, and by how many MiB memory grew after the warm-up."""

    loss: float
    gradient: float
    grown: float


def random_batch(generator: torch.Generator, longest: int) -> tiny.Batch:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    rows: list[list[int]] = [[] for _ in range(number(1, 3))]
    images = number(0, 8) if number(0, 1) else 0
    for _ in range(images):
        rows[number(0, len(rows) - 1)] += [tiny.IMAGE] * tiny.GRID**2
    for row in rows:
        row += tiny.text_row(number(1, longest // len(rows)), generator)
    pad = None if len(rows) == 1 else ("left", "right")[number(0, 1)]
    batch = tiny.collate(rows, pad)
    if pad == "left":  # padding in front of a row predicts nothing here
        batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    if number(0, 9) == 0:
        batch["labels"].fill_(-100)
    if images:
        side = tiny.GRID * tiny.PATCH
        batch["pixel_values"] = torch.randn(images, 3, side, side, generator=generator)
    return batch


def used() -> float:
    """MiB of this process, as the most that it ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(steps: int, longest: int) -> Fuzzed:
    """Train on so many batches."""
    generator = torch.Generator().manual_seed(0)
    reference = zoo.CASES["llava"].model(torch.float32)
    model: nn.Module = triton_sp.wrap(copy.deepcopy(reference))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_error = gradient_error = before = 0.0
    for number in range(steps):
        batch = random_batch(generator, longest)
        loss = model(**batch).loss
        loss.backward()
        triton_sp.sync_gradients(model)
        assert torch.isfinite(loss), (number, {name: x.shape for name, x in batch.items()})
        if number % COMPARED == 0 and (batch["labels"][:, 1:] != -100).any():
            reference.load_state_dict(model.state_dict())
            reference.zero_grad()
            expected = reference(**batch).loss
            expected.backward()
            loss_error = max(loss_error, relative_error(loss, expected))
            gradient_error = max(
                gradient_error, parity.gradient_error(parity.gradients(model), parity.gradients(reference))[0]
            )
        optimizer.step()
        optimizer.zero_grad()
        if number == min(WARM, steps // 2):
            before = used()
    return Fuzzed(loss_error, gradient_error, used() - before)


def main() -> int:
    pool, steps = RankPool(), int(sys.argv[1])
    results = pool.run(run, steps, 1000, ranks=2, timeout=1e5)
    pool.close()
    for rank, result in enumerate(results):
        print(f"rank {rank}: {steps} steps, {result}")
    return int(max(r.grown for r in results) > 50 or max(max(r.loss, r.gradient) for r in results) > 1e-4)


if __name__ == "__main__":
    raise SystemExit(main())
