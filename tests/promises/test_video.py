"""A video of 500 frames: every patch on one rank, and each rank keeps its share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kit import parity, tiny, zoo
from kit.tiny import FIRST_TEXT, PATCH, VIDEO, VISION_END, VISION_START

import triton_sp
from triton_sp.testing import relative_error, saved_activations
from triton_sp.wrappers.install import installation_of

FRAMES, HEIGHT, WIDTH = 500, 4, 6  # patches of a frame; two frames are one in time
FEATURES = HEIGHT * WIDTH // 4  # of two frames


@dataclass(frozen=True)
class Step:
    """What a rank has done with the video."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    saved: int  # bytes
    patches: tuple[int, ...]  # of each rank
    rows: tuple[int, ...]  # features that each rank has received


def video(name: str) -> tiny.Batch:
    """Qwen2.5-VL has one run of placeholders, the others one for each moment, between timestamps."""
    moments = FRAMES // 2
    if name == "qwen2_5_vl":
        shown = [VISION_START, *[VIDEO] * (FEATURES * moments), VISION_END]
    else:
        shown = [FIRST_TEXT, VISION_START, *[VIDEO] * FEATURES, VISION_END] * moments
    ids = torch.tensor([[*range(FIRST_TEXT, FIRST_TEXT + 9), *shown, *range(FIRST_TEXT, FIRST_TEXT + 21)]])
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == VIDEO, -100),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": tiny.pixels(moments * HEIGHT * WIDTH, 3 * 2 * PATCH**2, dtype=torch.float32),
        "video_grid_thw": torch.tensor([[moments, HEIGHT, WIDTH]]),
    }


def run(name: str, wrapped: bool) -> Step:
    model, batch = zoo.CASES[name].model(torch.float32), video(name)
    if wrapped:
        triton_sp.wrap(model)
    with saved_activations(model) as saved:
        loss = model(**batch).loss
    kept = saved[0]
    loss.backward()
    if not wrapped:
        return Step(loss.detach(), parity.gradients(model), kept, (), ())
    triton_sp.sync_gradients(model)
    installation = installation_of(model)
    assert installation is not None
    tower = installation.last_calls[installation.anatomy.towers[0].name].choice.shards
    (rows,) = [rows for method, rows in installation.last_rows.items() if "video" in method]
    return Step(loss.detach(), parity.gradients(model), kept, tower.sizes, rows.sizes)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5_vl"])
def test_500_frames(ranks, name: str, size: int) -> None:
    alone, patches = run(name, wrapped=False), FRAMES // 2 * HEIGHT * WIDTH
    for rank in ranks.run(run, name, True, ranks=size):
        assert relative_error(rank.loss, alone.loss) < 1e-6
        assert parity.gradient_error(rank.gradients, alone.gradients)[0] < 1e-3
        assert sum(rank.patches) == patches and max(rank.patches) <= 1.1 * patches / size
        assert sum(rank.rows) == patches // 4
        assert rank.saved * size <= 1.25 * alone.saved, (rank.saved, alone.saved)
