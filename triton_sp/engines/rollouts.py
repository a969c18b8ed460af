"""Trainers that generate what they learn from, as TRL's GRPO and RLOO do: a group of ranks counts as one process.

Such a trainer gives every process prompts, a random seed and completions of its own. The ranks of a group must have the
same ones: they get one seed, and the completions and rewards of their first rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_sp.engines.batches import Sharing, from_source
from triton_sp.errors import InputError
from triton_sp.ranks import groups
from triton_sp.ranks.groups import Group


def share_rollouts(trainer: Any, group: Group, leaders: list[int], limit: int) -> None:
    """Adapt a trainer, in place, before it trains.

    Args:
        leaders: the world ranks that are the first of their groups.
        limit: the most bytes of completions.

    Raises:
        InputError: batches in which the completions of a prompt are spread over processes, or advantages that are
            normalised over all processes' completions, which counts each of a group's.
    """
    arguments = trainer.args
    _refuse(arguments, trainer)
    arguments.generation_batch_size //= group.size
    _seed(arguments.seed + leaders.index(groups.world_rank(0, group)))
    trainer._generate_single_turn = partial(_completions, trainer._generate_single_turn, group, limit)
    trainer._calculate_rewards = partial(_rewards, trainer._calculate_rewards, group, limit)


def _refuse(arguments: Any, trainer: Any) -> None:
    per_process = {
        "per_device_train_batch_size * steps_per_generation": (
            arguments.per_device_train_batch_size * arguments.steps_per_generation,
            trainer.num_generations,
        )
    }
    if arguments.eval_strategy != "no":
        size = (arguments.per_device_eval_batch_size, trainer.num_generations_eval)
        per_process["per_device_eval_batch_size"] = size
    for name, (size, generations) in per_process.items():
        if size % generations:
            raise InputError(
                name,
                expected=f"a multiple of num_generations, {generations}: a group of ranks scores prompts by itself",
                found=f"{size}",
                remedy="change one of them",
            )
    over_all = {
        "scale_rewards": "batch",
        "multi_objective_aggregation": "normalize_then_sum",
        "normalize_advantages": True,
    }
    for name, value in over_all.items():
        if getattr(arguments, name, None) == value:
            raise InputError(
                name,
                expected="advantages that are formed prompt by prompt",
                found=f"{value!r}, which counts the completions of all processes, those of a group several times",
                remedy="leave it at TRL's default",
            )


def _seed(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


def _completions(generate: Any, group: Group, limit: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Ids, and log-probabilities where the generator gives them: those of the group's first rank."""
    ids, log_probs = generate(*args, **kwargs)  # on all ranks: an engine that shards weights gathers them there
    given = [
        [torch.tensor(row) for row in ids],
        None if log_probs is None else [torch.tensor(row, dtype=torch.float64) for row in _numbers(log_probs)],
    ]
    ids, log_probs = from_source(lambda: given, 0, Sharing(group, limit))
    return [row.tolist() for row in ids], None if log_probs is None else [row.tolist() for row in log_probs]


def _numbers(rows: list[list[float | None]]) -> list[list[float]]:
    return [[float("nan") if x is None else x for x in row] for row in rows]


def _rewards(calculate: Any, group: Group, limit: int, *args: Any, **kwargs: Any) -> Tensor:
    own = calculate(*args, **kwargs)
    return from_source(lambda: own, 0, Sharing(group, limit)).to(own.device)
