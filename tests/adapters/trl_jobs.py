"""Jobs for TRL: its trainers on ranks, and the same trainers, without triton_sp, on a process a group."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import trl
import trl_models
from datasets import Dataset
from kit.parity import weights_error
from torch.distributed.device_mesh import init_device_mesh
from trainer_jobs import as_torchrun

import triton_sp
from triton_sp.ranks import collectives

RATE, STEPS = 0.5, 3


def _sft_text(packing: bool = False) -> dict[str, Any]:
    rows = [
        {"prompt": trl_models.sentence(i, 4), "completion": trl_models.sentence(50 + i, 3 + 4 * (i % 5))}
        for i in range(24)
    ]
    options = {"packing": packing, "max_length": 48} if packing else {"max_length": None}
    return {"data": rows, "options": options, "model": trl_models.language_model, "processing": tiny.tokenizer}


def _sft_vision() -> dict[str, Any]:
    rows = []
    for i in range(12):
        question = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": trl_models.sentence(i, 2 + i)}],
        }
        answer = {"role": "assistant", "content": [{"type": "text", "text": trl_models.sentence(60 + i, 3)}]}
        rows.append({"images": [tiny.photograph(i)], "messages": [question, answer]})
    return {
        "data": rows,
        "options": {"max_length": None},
        "model": trl_models.vision_language_model,
        "processing": tiny.processor,
    }


def _dpo() -> dict[str, Any]:
    rows = [
        {
            "prompt": trl_models.sentence(i, 3 + i % 4),
            "chosen": trl_models.sentence(30 + i, 5),
            "rejected": trl_models.sentence(70 + i, 2 + i % 3),
        }
        for i in range(12)
    ]
    options = {"beta": 0.5, "max_length": None}
    return {"data": rows, "options": options, "model": trl_models.language_model, "processing": tiny.tokenizer}


def _grpo() -> dict[str, Any]:
    rows = [{"prompt": trl_models.sentence(i, 3 + i % 4)} for i in range(12)]
    options = {
        "num_generations": 2,
        "max_completion_length": 6,
        "beta": 0.1,
        "num_iterations": 2,
        "steps_per_generation": 1,
    }
    return {"data": rows, "options": options, "model": trl_models.language_model, "processing": tiny.tokenizer}


def reward(completions: list[str], **rest: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


CASES = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, _sft_text),
    "sft_packed": (trl.SFTTrainer, trl.SFTConfig, lambda: _sft_text(packing=True)),
    "sft_vision": (trl.SFTTrainer, trl.SFTConfig, _sft_vision),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, _dpo),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, _grpo),
}


def train(case: str, file: str, size: int, groups: int = 0, wrap_first: bool = True) -> dict[str, Any]:
    """Train, and on one group of ranks for each process of the reference compare with its weights.

    Args:
        file: where the reference leaves weights, and ranks find them.
        groups: of ranks; 0 for the reference, without triton_sp.
        size: of the batch of a process.
        wrap_first: whether the model is wrapped before its trainer is made, or after.
    """
    trainer_of, config_of, made = CASES[case]
    parts = made()
    model = parts["model"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mesh = None
    more: dict[str, Any] = {}
    if groups:
        mesh = init_device_mesh("cpu", (groups, dist.get_world_size() // groups), mesh_dim_names=("dp", "sp"))
    if case == "dpo":
        more["ref_model"] = parts["model"]()
    if case == "grpo":
        more["reward_funcs"] = reward
    with as_torchrun(), tempfile.TemporaryDirectory() as folder:
        config = config_of(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            bf16=False,
            per_device_train_batch_size=size,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0,
            gradient_checkpointing=False,
            ddp_find_unused_parameters=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **parts["options"] | ({} if case == "grpo" else {"train_sampling_strategy": "sequential"}),
        )
        for wrapped in [model, *([more["ref_model"]] if "ref_model" in more else [])]:
            if groups and wrap_first:
                triton_sp.wrap(wrapped, mesh, triton_sp.SPConfig(plan="heads"))
        if case == "grpo":
            place = model.config._name_or_path = str(Path(file).parent / "model")  # the trainer's ref_model is loaded
            model.save_pretrained(place)  # transformers lets the first rank write
            dist.barrier()
        trainer = trainer_of(
            model,
            args=config,
            train_dataset=Dataset.from_list(parts["data"]),
            processing_class=parts["processing"](),
            **more,
        )
        if groups:
            if not wrap_first:
                triton_sp.wrap(trainer.model, mesh, triton_sp.SPConfig(plan="heads"))
            if case == "grpo":
                triton_sp.wrap(trainer.ref_model, mesh, triton_sp.SPConfig(plan="heads"))
            triton_sp.share_batches(trainer, mesh)
        with collectives.record() as ledger:
            trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
    result = {"losses": [row["loss"] for row in history], "exchanges": ledger.count("exchange")}
    # GRPO adds up the tokens of all processes, those of a group's ranks too.
    names = {"entropy", "mean_token_accuracy", "reward", "kl", *(() if case == "grpo" else ("num_tokens",))}
    result["metrics"] = {name: value for name, value in history[-1].items() if name in names}
    if not groups:
        if dist.get_rank() == 0:
            torch.save((model.state_dict(), before), file)
        return result
    reference = parts["model"]()
    weights, start = torch.load(file)
    reference.load_state_dict(weights)
    assert all(torch.equal(start[name], before[name]) for name in before)
    moved = max(float((weights[name] - before[name]).norm()) for name in before)
    return result | {"error": weights_error(model.state_dict(), reference, before), "moved": moved}
