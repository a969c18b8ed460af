"""share_batches: loaders that give the ranks of a group the same batches, also in accelerate and the HF Trainer.

Accelerate gives every process different data, and its metrics count every process. An adapted Accelerator counts groups
instead of processes. What a Trainer counts by itself stays right: it sums `num_items_in_batch` over all processes,
which is P times too much, and multiplies the loss by the number of processes, which is P times too much as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import DataLoader

from triton_sp.engines.batches import SharedBatches, Sharing
from triton_sp.engines.own import own_batches
from triton_sp.engines.resuming import ResumableBatches
from triton_sp.engines.rollouts import share_rollouts
from triton_sp.errors import InputError, require
from triton_sp.ranks import collectives, groups
from triton_sp.wrappers.fusion.pixels import cut_pixels, cuttable
from triton_sp.wrappers.install import installation_of

_T = TypeVar("_T")


def share_batches(source: _T, group: Any = None, *, limit: int = 8 << 30, model: nn.Module | None = None) -> _T:
    """Give all ranks of a group the same batches, of which each rank decodes every P-th.

    Args:
        source: a DataLoader that would give the same batches on each rank of the group, with the sampler of a
            data-parallel rank; or an `accelerate.Accelerator` or a `transformers.Trainer`, which then do this with
            all their loaders, and count each group once in metrics.
        group: the group that was passed to `wrap`.
        limit: the most bytes that a rank takes for a batch.
        model: the wrapped model that the batches are for. Each rank is then sent the patches or images that it runs,
            instead of all, and only the wrapped model takes such batches: in the place of pixels they have this rank's
            part, a `PixelShard`.

    Returns:
        For a DataLoader, another one of the same length; otherwise the same object. Batches are tensors, numbers and
        strings in dicts, lists and tuples. With NCCL they arrive on the GPU.

    Raises:
        InputError: `source` is none of these, or an Accelerator that divides batches itself. While batches are read,
            on every rank: a batch that cannot be sent or is too large. Or `model` needs all pixels on a rank.
        GroupError: `model` is wrapped for other ranks.
        DisagreementError: while batches are read: reading failed on another rank.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> [batch.tolist() for batch in share_batches(DataLoader([1, 2, 3], batch_size=2))]
    [[1, 2], [3]]
    >>> dist.destroy_process_group()
    """
    resolved = groups.resolve_group(group)
    cut = None if model is None or resolved.size == 1 else partial(cut_pixels, cuttable(model, resolved))
    sharing = Sharing(resolved, limit, cut)
    if isinstance(source, DataLoader):
        return source if resolved.size == 1 else SharedBatches(source, sharing)  # type: ignore[return-value]
    if hasattr(source, "prepare_data_loader"):
        return _adapt(source, sharing)
    if hasattr(source, "accelerator"):
        return _adapt_trainer(source, sharing)
    raise InputError(
        "source",
        expected="a torch DataLoader, an accelerate.Accelerator or a transformers.Trainer",
        found=type(source).__name__,
        remedy="in a plain loop, pass its DataLoader",
    )


def _adapt_trainer(trainer: Any, sharing: Sharing) -> Any:
    group = sharing.group
    installation = installation_of(trainer.model) if getattr(trainer, "label_smoother", None) else None
    if installation is not None and installation.group.size > 1 and not installation.config.gather_logits:
        raise InputError(
            "TrainingArguments.label_smoothing_factor",
            expected="0: the Trainer would smooth labels of the whole batch by logits of this rank's tokens",
            found=f"{trainer.label_smoother.epsilon}",
            remedy="use SPConfig(label_smoothing=...) instead",
        )
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        wrapped = None if model is None else installation_of(model)
        if wrapped is not None:
            wrapped.return_to_front()  # of the fused head that TRL's trainers put on the model
    _adapt(trainer.accelerator, sharing)
    if group.size > 1:
        made = trainer.get_train_dataloader
        trainer.get_train_dataloader = partial(own_batches, trainer.accelerator, sharing, made)
        if hasattr(trainer, "_generate_single_turn"):
            share_rollouts(trainer, group, collectives.leaders(group), sharing.limit)
    trainer.gather_function = trainer.accelerator.gather_for_metrics  # it keeps the one it was made with
    if group.size > 1 and getattr(trainer.args, "predict_with_generate", None) is not None:
        trainer.evaluation_loop = partial(_evaluate, trainer, trainer.evaluation_loop)
    return trainer


def _evaluate(trainer: Any, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A Seq2SeqTrainer begins each evaluation by taking a gather of its own, which would count every rank."""
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    return evaluation_loop(*args, **kwargs)


def _adapt(accelerator: Any, sharing: Sharing) -> Any:
    """Change an Accelerator in place: it prepares loaders for groups, and gathers metrics from one rank of each.

    Raises:
        InputError: a setting with which accelerate itself would divide batches among the ranks of a group.
    """
    _refuse(accelerator)
    _take_axis(accelerator, sharing.group)
    leaders = collectives.leaders(sharing.group)
    accelerator.prepare_data_loader = partial(_prepare_data_loader, accelerator, sharing, leaders)
    accelerator.gather_for_metrics = partial(_gather_for_metrics, accelerator, leaders)
    return accelerator


def _refuse(accelerator: Any) -> None:
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("sp_size", "tp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise InputError(
                f"ParallelismConfig.{name}",
                expected="1: triton_sp divides the tokens itself, of the whole batch",
                found=f"{getattr(parallelism, name)}",
                remedy="use cp_size in its place, whose axis of accelerate's mesh can be the group",
            )
    for name in ("dispatch_batches", "split_batches", "use_stateful_dataloader"):
        if getattr(accelerator, name, None):
            raise InputError(
                f"Accelerator.{name}",
                expected="False",
                found="True",
                remedy="leave it out: the ranks of a group take turns in loading",
            )


def _take_axis(accelerator: Any, group: groups.Group) -> None:
    """The axis `cp` of accelerate's mesh is the group's from here on: accelerate would cut the batch along it.

    Raises:
        InputError: the group is not that axis, or accelerate has changed a model for it already.
    """
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    if getattr(parallelism, "cp_size", 1) == 1:
        return
    axis = accelerator.torch_device_mesh["cp"].mesh.tolist()
    own = [groups.world_rank(rank, group) for rank in range(group.size)]
    remedy = 'pass accelerator.torch_device_mesh["cp"] to wrap and to share_batches'
    require(axis == own, InputError, "group", f"the axis cp of accelerate's mesh, ranks {axis}", f"{own}", remedy)
    require(
        not hasattr(accelerator, "_cp_context"),
        InputError,
        "accelerator",
        "one that has prepared nothing yet",
        "a model on which its own context parallelism is",
        "call share_batches before accelerator.prepare",
    )
    parallelism.cp_size = 1  # its mesh stays, and FSDP2 shards parameters over all its ranks


def _prepare_data_loader(
    accelerator: Any,
    sharing: Sharing,
    leaders: list[int],
    data_loader: Any,
    device_placement: bool | None = None,
    slice_fn_for_dispatch: Any = None,
) -> Any:
    """`Accelerator.prepare_data_loader`, where each group is one data-parallel rank."""
    from accelerate.data_loader import prepare_data_loader

    group = sharing.group
    if getattr(data_loader, "_is_accelerate_prepared", False):
        return data_loader
    prepared: Any = prepare_data_loader(
        data_loader,
        accelerator.device,
        num_processes=len(leaders),
        process_index=leaders.index(groups.world_rank(0, group)),
        put_on_device=accelerator.device_placement if device_placement is None else device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
    )
    if group.size > 1:
        shared = SharedBatches if prepared.device is None else ResumableBatches
        prepared.base_dataloader = shared(prepared.base_dataloader, sharing)
    accelerator._dataloaders.append(prepared)
    return prepared


def _gather_for_metrics(accelerator: Any, leaders: list[int], input_data: Any, use_gather_object: bool = False) -> Any:
    """`Accelerator.gather_for_metrics` from one rank of each group, because all ranks of a group hold the same."""
    from accelerate.utils import recursively_apply

    gather, world = type(accelerator).gather, accelerator.num_processes

    def gather_groups(tensors: Any) -> Any:
        everyone = gather(accelerator, tensors)
        return recursively_apply(lambda x: x.unflatten(0, (world, -1))[leaders].flatten(0, 1), everyone)

    if use_gather_object:
        raise InputError(
            "use_gather_object", expected="False", found="True", remedy="gather tensors; objects travel pickled"
        )
    accelerator.gather = gather_groups
    try:
        return type(accelerator).gather_for_metrics(accelerator, input_data)
    finally:
        del accelerator.gather
