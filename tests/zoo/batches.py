"""Text of several rows, padded or packed, and noise for pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo.shrink import FIRST_TEXT

Batch = dict[str, Tensor]
LENGTHS = (17, 9, 14, 11)  # tokens of text in each row: more rows than ranks
LAST_TEXT = 100


def text_batch(generator: torch.Generator, runs: list[list[int]] | None = None) -> Batch:
    """(B, S) rows, padded on the left, and labels for their text. `runs`: placeholders of each row, after two tokens of
    text each."""
    rows: list[list[int]] = []
    for row, length in enumerate(LENGTHS):
        text = torch.randint(FIRST_TEXT, LAST_TEXT, (length,), generator=generator).tolist()
        for number, run in enumerate(runs[row : row + 1] if runs else ()):
            text[2 + number : 2 + number] = run
        rows.append(text)
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(rows):
        ids[i, width - len(text) :] = torch.tensor(text)
        mask[i, width - len(text) :] = 1
    labels = ids.masked_fill((mask == 0) | (ids < FIRST_TEXT), -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding predicts differs between implementations of attention
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch(generator: torch.Generator) -> Batch:
    """One row of documents that are told apart by their positions."""
    ids = torch.randint(FIRST_TEXT, LAST_TEXT, (1, sum(LENGTHS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


def noise(*shape: int) -> Tensor:
    """Pixels in float64, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).double()
