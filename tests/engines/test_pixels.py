"""`share_batches(loader, model=model)`: each rank is sent the patches or images that it runs, and no others."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch.utils.data import DataLoader
from trainer_jobs import LIKE_BY_HAND, RATE, as_torchrun, items_in, total_loss

import triton_sp
from triton_sp.engines.wire import room
from triton_sp.errors import DisagreementError, GroupError, InputError
from triton_sp.ranks import collectives
from triton_sp.testing import RankError
from triton_sp.wrappers.cuts import PixelShard

PIXELS = ("pixel_values", "pixel_values_videos")
WHY = "on the rank that loaded the batch as SPConfig.plan says"


@dataclass(frozen=True)
class Shared:
    """What a rank saw of one batch, in bytes of pixels, and what `explain` says after it."""

    sent: int
    held: int
    broadcast: int  # the largest message to all ranks, by the rank that has loaded the batch
    explained: str


def only(batch: list[Any]) -> Any:
    return batch[0]


def batches_of(name: str, dtype: torch.dtype | None = None) -> list[tiny.Batch]:
    case = replace(zoo.CASES[name], dtype=dtype or zoo.CASES[name].dtype)
    return [case.batch(batch) for batch in case.batches]


def write_reference(name: str, path: Path) -> None:
    with parity.in_dtype_of(zoo.CASES[name]):
        torch.save([parity.exact_step(zoo.CASES[name].model(), batch) for batch in batches_of(name)], path)


def step(model: torch.nn.Module, batch: tiny.Batch) -> parity.Step:
    model.zero_grad()
    loss = parity.loss_of(model(**batch), None)
    loss.backward()
    triton_sp.sync_gradients(model)
    return loss.detach(), parity.gradients(model)


def wrapped(name: str, plan: Any = "heads", dtype: torch.dtype | None = None) -> torch.nn.Module:
    return triton_sp.wrap(zoo.CASES[name].model(dtype), config=triton_sp.SPConfig(plan=plan, gradient="sum"))


def largest_message(batch: tiny.Batch, size: int) -> int:
    """The bytes of what is not cut, to each of the others; or of their description, which is about a kilobyte."""
    rest = sum(room(value) for key, value in batch.items() if key not in PIXELS)
    return max(rest, 2000) * (size - 1)


def shards_in(batch: Any) -> list[PixelShard]:
    return [batch[key] for key in PIXELS if isinstance(batch.get(key), PixelShard)]


def run(name: str, plan: str, reference: Path) -> list[Shared]:
    with parity.in_dtype_of(zoo.CASES[name]):
        return _run(name, plan, reference)


def _run(name: str, plan: str, reference: Path) -> list[Shared]:
    model, seen = wrapped(name, plan), []
    loader: Any = DataLoader(batches_of(name), collate_fn=only)  # type: ignore[arg-type]
    shared = iter(triton_sp.share_batches(loader, model=model))
    for wanted, original in zip(torch.load(reference), batches_of(name), strict=True):
        with collectives.record() as ledger:
            batch = next(shared)
        assert batch.keys() == original.keys()
        shards = shards_in(batch)
        parity.assert_close(step(model, batch), wanted, parity.TOLERANCE[zoo.CASES[name].dtype])
        seen.append(
            Shared(
                sum(size for kind, size in ledger.entries if kind == "deal"),
                sum(shard.rows.nbytes for shard in shards),
                max(size for kind, size in ledger.entries if kind == "broadcast"),
                str(triton_sp.explain(model)),
            )
        )
    assert next(shared, None) is None
    return seen


TWICE = [("qwen2_5_vl", "heads"), ("qwen2_5_vl", "segments"), ("qwen3_vl", "heads")]


@pytest.mark.parametrize(
    ("name", "plan", "size"),
    [*((*case, size) for case in TWICE for size in (2, 3)), ("qwen3_5_vl", "heads", 3), ("glm4v", "heads", 3)],
)
def test_each_patch_is_sent_once(ranks, tmp_path: Path, name: str, plan: str, size: int) -> None:
    write_reference(name, tmp_path / "alone")
    found = ranks.run(run, name, plan, tmp_path / "alone", ranks=size)
    sizes = [sum(batch[key].nbytes for key in PIXELS if key in batch) for batch in batches_of(name)]
    assert sum(sizes) > 200_000
    for index, whole in enumerate(sizes):
        seen = [rank[index] for rank in found]
        source = seen[index % size]
        assert sum(rank.held for rank in seen) == whole
        assert sum(rank.sent for rank in seen) == source.sent == whole - source.held
        assert max(rank.broadcast for rank in seen) <= largest_message(batches_of(name)[index], size)
        assert not whole or all(WHY in rank.explained for rank in seen)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next"])
def test_each_image_is_sent_once(ranks, tmp_path: Path, name: str, size: int) -> None:
    write_reference(name, tmp_path / "alone")
    found = ranks.run(run, name, "heads", tmp_path / "alone", ranks=size)
    cut = 0
    for index, batch in enumerate(batches_of(name)):
        seen, pixels = [rank[index] for rank in found], batch.get("pixel_values")
        if pixels is None or len(pixels) < size:  # a rank without an image runs another's to no effect
            assert all(rank.held == 0 == rank.sent for rank in seen)
            continue
        cut += 1
        source = seen[index % size]
        assert sum(rank.held for rank in seen) == pixels.nbytes
        assert sum(rank.sent for rank in seen) == source.sent == pixels.nbytes - source.held
        assert max(rank.broadcast for rank in seen) <= largest_message(batch, size)
    assert cut > 2


def run_replicated(reference: Path) -> None:
    model = wrapped("qwen2_5_vl", "replicate")
    loader: Any = DataLoader(batches_of("qwen2_5_vl"), collate_fn=only)  # type: ignore[arg-type]
    for batch, wanted in zip(triton_sp.share_batches(loader, model=model), torch.load(reference), strict=True):
        assert not shards_in(batch)
        # Each rank's share of the gradient passes the tower's norms, which round it to float32.
        parity.assert_close(step(model, batch), wanted, 1e-6)


def test_a_tower_that_every_rank_runs_gets_all_pixels(ranks, tmp_path: Path) -> None:
    write_reference("qwen2_5_vl", tmp_path / "alone")
    ranks.run(run_replicated, tmp_path / "alone", ranks=2)


def train() -> tuple[int, float]:
    """A Trainer: how many batches came in parts, and how far the weights are from those of one process."""
    from transformers import Trainer, TrainingArguments

    data, model = batches_of("qwen2_5_vl", torch.float32), zoo.CASES["qwen2_5_vl"].model(torch.float32)
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    optimizer, parts = torch.optim.SGD(reference.parameters(), lr=RATE), list[PixelShard]()
    for batch in data:
        (total_loss(reference, batch) / items_in([batch])).backward()
        optimizer.step()
        optimizer.zero_grad()

    class Watching(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            parts.extend(shards_in(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with as_torchrun(), tempfile.TemporaryDirectory() as folder:
        options = LIKE_BY_HAND | {"gradient_accumulation_steps": 1}
        arguments = TrainingArguments(folder, **options, num_train_epochs=1, optim="sgd", save_strategy="no")
        triton_sp.wrap(model, config=triton_sp.SPConfig(plan="heads"))
        trainer = Watching(model, arguments, only, train_dataset=data)
        triton_sp.share_batches(trainer, model=trainer.model)
        trainer.train()
    return len(parts), parity.weights_error(model.state_dict(), reference, before)


def test_a_trainer(ranks) -> None:
    expected = sum(key in batch for batch in batches_of("qwen2_5_vl") for key in PIXELS)
    for parts, error in ranks.run(train, ranks=2):
        assert parts == expected > 5
        assert error < 1e-3


# --- what is refused -----------------------------------------------------------------------------------------------


def share(batches: list[Any], model: Any, group: Any = None, **options: Any) -> Any:
    loader: Any = DataLoader(batches, collate_fn=only)  # type: ignore[arg-type]
    return next(iter(triton_sp.share_batches(loader, group, model=model, **options)))


def refuse_models() -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM, of whose features no part .*leave model out"):
        share([], wrapped("llama"))
    with pytest.raises(InputError, match=r'accepted by structure, .*SPConfig\(trial="off"\)'):
        share([], wrapped("minicpmv4_6"))
    with pytest.raises(InputError, match="wrap it first"):
        share([], zoo.CASES["qwen2_5_vl"].model())
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    alone = triton_sp.wrap(zoo.CASES["qwen2_5_vl"].model(), own)
    with pytest.raises(GroupError, match="rank 0 of 1"):
        share([], alone)


def refuse_calls() -> None:
    model = wrapped("qwen2_5_vl")
    batch = share(batches_of("qwen2_5_vl")[:1], model)
    assert shards_in(batch)
    with pytest.raises(InputError, match=r"all pixels.*without model"):
        model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    ids = batch["input_ids"]
    with pytest.raises(InputError, match=r"all pixels.*without model"):
        model.generate(input_ids=ids, **{key: batch[key] for key in batch if key.startswith(("pixel", "image"))})
    refuse_other_cuts(model, batch)
    model = wrapped("llava")
    refuse_other_cuts(
        model, share([max(batches_of("llava"), key=lambda batch: len(batch.get("pixel_values", ())))], model)
    )


def refuse_other_cuts(model: torch.nn.Module, batch: Any) -> None:
    shard = batch["pixel_values"]
    first, second = shard.cut.sizes
    other = replace(shard, cut=replace(shard.cut, sizes=(first + 4, second - 4)))
    with pytest.raises(InputError, match="as it is wrapped now"):
        model(**batch | {"pixel_values": other})
    other = replace(shard, cut=replace(shard.cut, digest=f"of rank {dist.get_rank()}"))
    with pytest.raises(DisagreementError, match="pixel_values"):
        model(**batch | {"pixel_values": other})


@pytest.mark.parametrize("job", [refuse_models, refuse_calls])
def test_refused(ranks, job: Any) -> None:
    ranks.run(job, ranks=2)


def share_unlike(what: str) -> None:
    model, (batch, *_) = wrapped("qwen2_5_vl"), batches_of("qwen2_5_vl")
    if what == "a model on one rank":
        share([batch], model if dist.get_rank() else None)
    elif what == "no dict":
        share([tuple(batch.values())], model)
    elif what == "pixels beyond the grids":
        share([batch | {"pixel_values": batch["pixel_values"].repeat(2, 1)}], model)
    else:
        share([batch], model, limit=1000)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("a model on one rank", "pixels are cut"),
        ("no dict", "a dict, as the model takes it"),
        ("pixels beyond the grids", "rows of patches, as image_grid_thw counts"),
        ("too large", "up to 1000 bytes"),
    ],
)
def test_refused_by_all(ranks, what: str, found: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(share_unlike, what, ranks=2, timeout=60)
    assert len(raised.value.errors) == 2
    for error in raised.value.errors.values():
        assert found in str(error)
