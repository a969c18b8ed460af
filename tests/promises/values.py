"""Values of a call that one process refuses, or that nobody reads: the table of test_values.py.

Each entry changes a good batch. The model runs in one process with it too: where that raises, every rank must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kit import tiny, zoo

import triton_sp
from triton_sp.errors import SPError

Batch = dict[str, Any]


@dataclass(frozen=True)
class Wrong:
    """A change to a batch.

    Attributes:
        field: the one that the error must name.
        quiet: one process takes the value and goes on, with a number that means nothing.
    """

    change: Callable[[Batch], Batch]
    field: str
    quiet: bool = False


def put(name: str, value: Any) -> Callable[[Batch], Batch]:
    return lambda batch: batch | {name: value(batch) if callable(value) else value}


def at(name: str, column: int, value: int) -> Callable[[Batch], Batch]:
    """One entry of a field is another."""

    def change(batch: Batch) -> Batch:
        changed = batch[name].clone()
        changed[..., column] = value
        return batch | {name: changed}

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[Batch], Batch]:
    return lambda batch: batch | {name: batch[name].to(dtype)}


def on_meta(name: str) -> Callable[[Batch], Batch]:
    return lambda batch: batch | {name: batch[name].to("meta")}


def rows(name: str, more: int) -> Callable[[Batch], Batch]:
    """A field with more entries, or fewer."""
    return lambda batch: (
        batch | {name: torch.cat([batch[name], batch[name][:more]]) if more > 0 else batch[name][:more]}
    )


def without(*names: str) -> Callable[[Batch], Batch]:
    return lambda batch: {name: value for name, value in batch.items() if name not in names}


def embedded(batch: Batch) -> Batch:
    return batch | {"inputs_embeds": torch.zeros(*batch["input_ids"].shape, tiny.WIDTH, dtype=torch.float64)}


TEXT: dict[str, Wrong] = {
    "label -1": Wrong(at("labels", 5, -1), "labels"),
    "label -1 at the end": Wrong(at("labels", -1, -1), "labels"),
    "label of no word": Wrong(at("labels", 5, tiny.VOCAB), "labels"),
    "label far off": Wrong(at("labels", 5, 1 << 40), "labels"),
    "label -101": Wrong(at("labels", 5, -101), "labels"),
    "floating labels": Wrong(cast("labels", torch.float32), "labels"),
    "half labels": Wrong(cast("labels", torch.bfloat16), "labels"),
    "int32 labels": Wrong(cast("labels", torch.int32), "labels"),
    "int16 labels": Wrong(cast("labels", torch.int16), "labels"),
    "bool labels": Wrong(cast("labels", torch.bool), "labels"),
    "labels of a list": Wrong(put("labels", lambda batch: batch["labels"].tolist()), "labels"),
    "labels of one row": Wrong(put("labels", lambda batch: batch["labels"][0]), "labels", quiet=True),
    "id of no word": Wrong(at("input_ids", 3, tiny.VOCAB), "input_ids"),
    "id -1": Wrong(at("input_ids", -1, -1), "input_ids"),
    "complex ids": Wrong(cast("input_ids", torch.complex64), "input_ids"),
    "bool ids": Wrong(cast("input_ids", torch.bool), "input_ids"),
    "int16 ids": Wrong(cast("input_ids", torch.int16), "input_ids"),
    "meta ids": Wrong(on_meta("input_ids"), "input_ids", quiet=True),
    "meta labels": Wrong(on_meta("labels"), "labels"),
    "meta mask": Wrong(put("attention_mask", lambda batch: torch.ones_like(batch["labels"], device="meta")),
                       "attention_mask", quiet=True),
    "items 0": Wrong(put("num_items_in_batch", 0), "num_items_in_batch", quiet=True),
    "items -3": Wrong(put("num_items_in_batch", -3), "num_items_in_batch", quiet=True),
    "items NaN": Wrong(put("num_items_in_batch", float("nan")), "num_items_in_batch", quiet=True),
    "items infinite": Wrong(put("num_items_in_batch", torch.tensor(torch.inf)), "num_items_in_batch", quiet=True),
    "items of each rank": Wrong(put("num_items_in_batch", torch.tensor([3, 4])), "num_items_in_batch", quiet=True),
    "items of a text": Wrong(put("num_items_in_batch", "7"), "num_items_in_batch"),
    "items True": Wrong(put("num_items_in_batch", True), "num_items_in_batch", quiet=True),
    "unknown argument": Wrong(put("lables", lambda batch: batch["labels"]), "lables", quiet=True),
    "unknown number": Wrong(put("temperature", 0.7), "temperature", quiet=True),
    "ids and embeddings": Wrong(embedded, "inputs_embeds"),
    "positions of 3 rows": Wrong(put("position_ids", torch.arange(37).repeat(3, 1)), "position_ids"),
    "floating positions": Wrong(put("position_ids", torch.arange(37.0)[None]), "position_ids", quiet=True),
    "positions of a list": Wrong(put("position_ids", [list(range(37))]), "position_ids"),
    "positions without rows": Wrong(put("position_ids", torch.arange(37)), "position_ids", quiet=True),
    "meta positions": Wrong(put("position_ids", torch.arange(37, device="meta")[None]), "position_ids", quiet=True),
    "mask of values": Wrong(put("attention_mask", torch.ones(1, 1, 37, 37)), "attention_mask", quiet=True),
}  # fmt: skip

GRIDS: dict[str, Wrong] = {
    "a patch row too many": Wrong(rows("pixel_values", 1), "pixel_values"),
    "merge units too many": Wrong(rows("pixel_values", 8), "pixel_values", quiet=True),
    "merge units too few": Wrong(rows("pixel_values", -8), "pixel_values"),
    "grid that does not merge": Wrong(at("image_grid_thw", 1, 3), "image_grid_thw"),
    "negative grid": Wrong(at("image_grid_thw", 0, -1), "image_grid_thw"),
    "grid of nothing": Wrong(at("image_grid_thw", 0, 0), "image_grid_thw"),
    "floating grid": Wrong(cast("image_grid_thw", torch.float32), "image_grid_thw"),
    "grid of two numbers": Wrong(put("image_grid_thw", lambda batch: batch["image_grid_thw"][:, 1:]), "image_grid_thw"),
    "grid of one image": Wrong(put("image_grid_thw", lambda batch: batch["image_grid_thw"][0]), "image_grid_thw"),
    "grid of a list": Wrong(put("image_grid_thw", lambda b: b["image_grid_thw"].tolist()), "image_grid_thw"),
    "fewer grids": Wrong(rows("image_grid_thw", -1), "pixel_values"),
    "more grids": Wrong(rows("image_grid_thw", 1), "pixel_values"),
    "no grid": Wrong(without("image_grid_thw"), "image_grid_thw"),
    "meta pixels": Wrong(on_meta("pixel_values"), "pixel_values"),
    "integer pixels": Wrong(cast("pixel_values", torch.int64), "pixel_values", quiet=True),
    "placeholder cut off": Wrong(at("input_ids", 8, tiny.FIRST_TEXT), "image_token"),
    "positions of another batch": Wrong(put("position_ids", lambda batch: torch.zeros(
        3, 7, batch["input_ids"].shape[1], dtype=torch.long)), "position_ids"),
}  # fmt: skip

IMAGES: dict[str, Wrong] = {
    "an image too many": Wrong(rows("pixel_values", 1), "image_token"),
    "an image too few": Wrong(rows("pixel_values", -1), "image_token"),
    "no image at all": Wrong(put("pixel_values", lambda batch: batch["pixel_values"][:0]), "pixel_values"),
    "pixels of no image": Wrong(put("input_ids", lambda batch: batch["input_ids"].clamp(min=tiny.FIRST_TEXT)),
                                "image_token"),
    "meta pixels": Wrong(on_meta("pixel_values"), "pixel_values"),
    "integer pixels": Wrong(cast("pixel_values", torch.int64), "pixel_values", quiet=True),
}  # fmt: skip

SIZES: dict[str, Wrong] = {
    "an image too many": Wrong(rows("pixel_values", 1), "image_sizes", quiet=True),
    "sizes of fewer images": Wrong(rows("image_sizes", -1), "image_sizes"),
    "sizes of more images": Wrong(rows("image_sizes", 1), "image_sizes"),
}

TABLES = {"llava_next": SIZES, "llama": TEXT, "qwen2_5_vl": GRIDS, "llava": IMAGES}


BATCHES = {"llava": "right_pad", "llava_next": "right_pad"}  # of several images


def outcome(model: torch.nn.Module, batch: Batch) -> float | BaseException:
    """The loss, or what was raised."""
    try:
        return float(model(**batch).loss.detach())
    except Exception as error:
        return error


def good_batch(name: str) -> Batch:
    return dict(zoo.CASES[name].batch(BATCHES.get(name, "plain")))


def run(name: str, case: str | None = None) -> dict[str, list[Any]]:
    """What one process makes of each entry of a table, and then what this rank makes of it; errors as texts."""
    model, batch = zoo.CASES[name].model(), good_batch(name)
    changed = {label: wrong.change(batch) for label, wrong in TABLES[name].items() if case in (None, label)}
    found = {label: [outcome(model, inputs)] for label, inputs in changed.items()}
    triton_sp.wrap(model)
    for label, inputs in changed.items():
        found[label].append(outcome(model, inputs))
    found["good"] = [0.0, outcome(model, batch)]
    return {label: [_plain(result) for result in results] for label, results in found.items()}


def _plain(result: Any) -> Any:
    if not isinstance(result, BaseException):
        return result
    return result if isinstance(result, SPError) else RuntimeError(f"{type(result).__name__}: {result}")
