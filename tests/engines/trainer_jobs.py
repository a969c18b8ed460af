"""Jobs for the Hugging Face Trainer and accelerate: train and evaluate as a user does, and the same by hand."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ParallelismConfig
from kit import tiny, zoo
from kit.launch import torchrun_environment
from kit.parity import weights_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import triton_sp

RATE, EPOCHS, ACCUMULATION = 0.1, 2, 2
# A Trainer that does what `by_hand` does.
LIKE_BY_HAND: dict[str, Any] = {
    "use_cpu": True,
    "ddp_backend": "gloo",
    "ddp_find_unused_parameters": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": ACCUMULATION,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "report_to": [],
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "train_sampling_strategy": "sequential",
}


@contextmanager
def as_torchrun() -> Iterator[None]:
    """The environment of torchrun, and afterwards none of what accelerate keeps between runs."""
    try:
        with torchrun_environment():
            yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def samples(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Of different length, with one picture each but for some; `labels` of different number."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for index in range(count):
        ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (5 + 3 * index,), generator=generator)
        row = {"input_ids": ids, "labels": ids.clone()}
        row["labels"][: index % 4] = -100
        if index % 3 != 2:
            row["input_ids"] = torch.cat([torch.full((tiny.GRID**2,), tiny.IMAGE), ids])
            row["labels"] = torch.cat([torch.full((tiny.GRID**2,), -100), row["labels"]])
            row["pixel_values"] = tiny.pixels(1, 3, tiny.GRID * tiny.PATCH, tiny.GRID * tiny.PATCH, dtype=torch.float32)
        rows.append(row)
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", tiny.PAD), "labels": padded("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != tiny.PAD).long()
    pictures = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return batch | ({"pixel_values": torch.cat(pictures)} if pictures else {})


def total_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def items_in(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def by_hand(
    model: nn.Module, data: list[Any], size: int, groups: int, momentum: float = 0.0, stop: float = math.inf
) -> float:
    """Gradient descent in this process, a step for ACCUMULATION batches of `size` of each group, up to step `stop`; the
    first loss."""
    optimizer, first, steps = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum), math.nan, 0
    batches = [collate(data[i : i + size]) for i in range(0, len(data), size)]
    batches += batches[: -len(batches) % groups]  # as accelerate fills up the last step
    for _ in range(EPOCHS):
        for start in range(0, len(batches), ACCUMULATION * groups):
            if steps == stop:
                return first
            steps += 1
            step = batches[start : start + ACCUMULATION * groups]
            losses = [total_loss(model, batch) / items_in(step) for batch in step]
            first = float(torch.stack(losses).detach().sum()) if math.isnan(first) else first
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return first


@torch.no_grad()
def evaluate_by_hand(model: nn.Module, data: list[Any], groups: int) -> float:
    """As a Trainer on so many processes: a mean over tokens in each step, over samples beyond; the last step is filled
    up with the first samples, which do not count."""
    model.eval()
    losses: list[float] = []
    for start in range(0, len(data), groups):
        step = [collate([data[(start + i) % len(data)]]) for i in range(groups)]
        losses += [float(total_loss(model, batch)) * groups / items_in(step) for batch in step]
    return sum(losses[: len(data)]) / len(data)


def train(groups: int, count: int, zero: int | None = None) -> dict[str, float]:
    """How far a Trainer on groups of ranks is from one process: weights, first loss, loss of an evaluation.

    Args:
        zero: the stage of DeepSpeed's ZeRO, in the place of DDP.
    """
    from transformers import Trainer, TrainingArguments  # here: seconds on every rank, which accelerate does not need

    case = zoo.CASES["llava"]
    model, data, held_out = case.model(torch.float32), samples(count), samples(5, seed=1)
    if zero == 3 or (zero and groups > 1):  # see docs/engines.md: a picture in each step, on each rank
        data = [row for row in samples(3 * count) if "pixel_values" in row][:count]
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    first = by_hand(reference, data, 1, groups)

    mesh = init_device_mesh("cpu", (groups, dist.get_world_size() // groups), mesh_dim_names=("dp", "sp"))
    engine: dict[str, Any] = {}
    with as_torchrun(), tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if zero is not None:
            import deepspeed_jobs

            library = stack.enter_context(deepspeed_jobs.deepspeed())
            engine = {"deepspeed": deepspeed_jobs.AUTO | {"zero_optimization": {"stage": zero}}}
        arguments = TrainingArguments(
            folder,
            **(LIKE_BY_HAND | engine),
            per_device_eval_batch_size=1,
            num_train_epochs=EPOCHS,
            optim="sgd",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
        )
        triton_sp.wrap(model, mesh)
        trainer = Trainer(model, arguments, collate, train_dataset=data, eval_dataset=held_out)
        triton_sp.share_batches(trainer, mesh)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        steps = trainer.state.global_step
        logged = trainer.state.log_history[0]["loss"]
        weights = model.state_dict() if zero is None else deepspeed_jobs.whole_weights(library, trainer.deepspeed)
    expected = evaluate_by_hand(reference, held_out, groups)
    return {
        "weights": weights_error(weights, reference, before),
        "loss": abs(logged / first - 1),
        "eval": abs(evaluated / expected - 1),
        "steps": steps - EPOCHS * math.ceil(count / groups / ACCUMULATION),
    }


def predict() -> tuple[list[list[int]], list[list[int]], float]:
    """What a trainer with `predict_with_generate` predicts on a group, and what one process generates; the loss beside
    it, over that of an evaluation by hand."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model, data = zoo.CASES["llava"].model(torch.float32), samples(3, seed=1)
    expected, loss = [], evaluate_by_hand(model, data, 1)
    options = {"max_new_tokens": 4, "suppress_tokens": [tiny.IMAGE, tiny.PAD]}
    model.config.pad_token_id = model.generation_config.pad_token_id = tiny.PAD
    for row in data:
        batch = collate([row])
        batch.pop("labels")
        expected += model.generate(**batch, **options, do_sample=False).tolist()
    with as_torchrun(), tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            per_device_eval_batch_size=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            predict_with_generate=True,
        )
        triton_sp.wrap(model, config=triton_sp.SPConfig(shard_prefill=True))
        trainer = Seq2SeqTrainer(model, arguments, collate)
        triton_sp.share_batches(trainer)
        out = trainer.predict(data, **options)
    found = [[token for token in row if token not in (-100, tiny.PAD)] for row in out.predictions.tolist()]
    return found, expected, float(out.metrics["test_loss"]) / loss


def accelerate() -> float:
    """A plain accelerate loop with gradient accumulation, on 2 x 2 ranks; the worst relative error of the weights."""
    case = zoo.CASES["llava"]
    model, data = case.model(torch.float32), [row for row in samples(8) if "pixel_values" in row][:4]
    for row in data:  # accelerate takes the mean of the batches' losses: all have as many labels
        row["labels"][:-4] = -100
        row["labels"][-4:] = row["input_ids"][-4:]
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    by_hand(reference, data, 1, 2)
    with as_torchrun():
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, kwargs_handlers=[unused])
        mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2).build_device_mesh("cpu")["dp_shard"]
        triton_sp.wrap(model, mesh)
        triton_sp.share_batches(accelerator, mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        loader = DataLoader(data, batch_size=1, collate_fn=collate)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = 0
        for _ in range(EPOCHS):
            for batch in loader:
                with accelerator.accumulate(prepared):
                    loss = prepared(**batch).loss
                    seen += accelerator.gather_for_metrics(loss.detach()[None]).numel()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
        assert seen == EPOCHS * len(data), "each sample counts once in metrics"
    return weights_error(prepared.state_dict(), reference, before)


def accelerate_dividing(axis: str) -> None:
    """An Accelerator that divides batches among the ranks of a group itself."""
    config = ParallelismConfig(**{axis: 2}, **({"sp_backend": "deepspeed"} if axis == "sp_size" else {}))
    triton_sp.share_batches(SimpleNamespace(prepare_data_loader=None, parallelism_config=config))
