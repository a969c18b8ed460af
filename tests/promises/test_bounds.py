"""What a process holds stays the same, however many steps, shapes and groups there were."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo

import triton_sp
from triton_sp import SPConfig


def held() -> dict[str, int]:
    """Counts of this process. (Of tensors by their type: to ask an object for its class may run code.)"""
    gc.collect()
    return {
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "keys": dist.distributed_c10d._get_default_store().num_keys(),
        "kibibytes": 4 * int(Path("/proc/self/statm").read_text().split()[1]),
    }


def text(length: int) -> tiny.Batch:
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: Any, batch: tiny.Batch) -> None:
    model(**batch).loss.backward()
    triton_sp.sync_gradients(model)
    model.zero_grad()


def shapes(steps: int, check: str) -> list[dict[str, int]]:
    """Steps of texts of all lengths, some with images, and forwards without a backward."""
    model = triton_sp.wrap(zoo.CASES["llava"].model(), config=SPConfig(check=check, trial="off"))  # type: ignore[arg-type]
    counts = []
    for number in range(2 * steps):
        step(
            model, zoo.CASES["llava"].batch(("plain", "right_pad")[number % 2]) if number % 4 < 2 else text(3 + number)
        )
        model(**zoo.CASES["llava"].batch("plain"))
        if number % steps == steps - 1:
            counts.append(held())
    return counts


def groups(steps: int) -> list[dict[str, int]]:
    """A model is wrapped with one new group after another."""
    model, everyone, counts = zoo.CASES["llama"].model(), list(range(dist.get_world_size())), []
    for number in range(2 * steps):
        group: Any = dist.new_group(everyone)
        step(triton_sp.wrap(model, group), text(9 + number))
        triton_sp.unwrap(model)
        dist.destroy_process_group(group)
        if number % steps == steps - 1:
            counts.append(held())
    return counts


def assert_flat(before: dict[str, int], after: dict[str, int], new_groups: int = 0) -> None:
    assert after["tensors"] == before["tensors"], (before, after)
    assert after["threads"] <= before["threads"] + 1, (before, after)  # one that has not ended yet
    assert after["descriptors"] <= before["descriptors"] + 2, (before, after)
    assert after["keys"] <= before["keys"] + 2 * new_groups + 2, (before, after)  # torch leaves two of a group of two
    assert after["kibibytes"] < before["kibibytes"] + 40_000, (before, after)


@pytest.mark.parametrize("steps", [4, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_shapes(ranks, steps: int) -> None:
    for check in ("always", "first") if steps > 4 else ("first",):
        for before, after in ranks.run(shapes, steps, check, ranks=2, timeout=1800):
            assert_flat(before, after)


@pytest.mark.parametrize("steps", [3, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_groups(ranks, steps: int) -> None:
    for before, after in ranks.run(groups, steps, ranks=2, timeout=1800):
        assert_flat(before, after, steps)
