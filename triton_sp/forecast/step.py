"""What each rank will hold and send in a step.

The wrapped model itself is run, forward and backward, on one rank of a group of which the other ranks do not exist,
with tensors that have shapes and no numbers (hollow.py): whatever decides about shards, heads and routes is the code
that decides in the real run. Attention is taken to save its output and the log-sum-exp, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from triton_sp.api import unwrap, wrap
from triton_sp.config import SPConfig
from triton_sp.errors import InputError, require
from triton_sp.forecast.alike import Alike
from triton_sp.forecast.hollow import Hollow
from triton_sp.forecast.job import Job, make_batch
from triton_sp.forecast.likeness import Form, form_of
from triton_sp.ops import varlen
from triton_sp.plan.cost import find_link
from triton_sp.plan.shards import Shards, shard_tokens
from triton_sp.ranks import collectives, groups
from triton_sp.testing import saved_activations
from triton_sp.wrappers.fusion import composite, features
from triton_sp.wrappers.install import Installation, installation_of
from triton_sp.wrappers.layers import offload
from triton_sp.wrappers.towers import patches


@dataclass(frozen=True)
class Forecast:
    """What one rank of a group of `ranks` will have. Sizes are in bytes.

    Attributes:
        rank: which.
        tokens: of the batch, and `own_tokens` those of this rank.
        plans: of each stack, by its name.
        parameters, gradients, optimizer: what the engine leaves on a rank, of AdamW. ZeRO's and FSDP's states are in
            fp32 beside a master copy, DDP's in the dtype of the parameters.
        activations: what the forward saves for the backward, without what is offloaded.
        forward_peak: activations, and the most that lives beside them while the forward runs.
        backward_peak: the same while the backward runs: what is still saved, what is recomputed, and the gradient of
            one weight at a time.
        offloaded: what the forward saves in CPU memory instead (`SPConfig.offload`).
        total: parameters, gradients, optimizer and the larger of the peaks.
        sent: by this rank to others in the forward; `sent_in_step` with the backward. What the engine sends for weights
            and gradients, and what ranks compare, is in neither.
        flops: of products and attention, of this rank in a step, with what checkpointing computes again.
        seconds: an estimate of a step: flops at the rate, and bytes at the bandwidth, that `SPConfig.link` assumes, one
            after the other, and a latency for each collective. Engine, optimizer, data and everything that is not a
            product are not in it.
    """

    ranks: int
    rank: int
    tokens: int
    own_tokens: int
    plans: dict[str, str]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    forward_peak: int
    backward_peak: int
    offloaded: int
    total: int
    sent: int
    sent_in_step: int
    flops: int
    seconds: float

    def largest(self, memory: float) -> int:
        """About how many tokens of such a batch would fit into so many bytes, if the peak grows with the tokens."""
        states = self.parameters + self.gradients + self.optimizer
        return max(int(self.tokens * (memory - states) / max(self.total - states, 1)), 0)


def forecast(
    model: nn.Module, job: Job, ranks: Sequence[int], config: SPConfig | None = None, rank: int = 0
) -> list[Forecast]:
    """What a step will need, for each of these sizes of a group.

    Args:
        model: not wrapped; its weights are neither read nor changed, and may be on the meta device.
        rank: which rank of a group; of a smaller group its last.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(tiny)
    >>> [(row.own_tokens, row.plans) for row in forecast(model, Job(gpus=2, text=101), [2], rank=1)]
    [(50, {'model.layers': 'heads'})]
    """
    with Hollow() as hollow, _hollow_step(model, None, job, hollow) as batch:
        return [_follow(model, hollow, batch, job, (size, min(rank, size - 1)), config)[0] for size in ranks]


def forecast_batch(
    model: nn.Module, batch: Mapping[str, Any] | None, job: Job, ranks: int, config: SPConfig | None, rank: int = 0
) -> tuple[Forecast, Installation]:
    """The same for one group and a batch of one's own, and what was installed meanwhile, with its plans.

    Args:
        batch: the arguments of the model's forward, `labels` among them; None makes one for the job.
    """
    with Hollow() as hollow, _hollow_step(model, batch, job, hollow) as given:
        return _follow(model, hollow, given, job, (ranks, rank), config)


@contextmanager
def _hollow_step(
    model: nn.Module, batch: Mapping[str, Any] | None, job: Job, hollow: Hollow
) -> Iterator[dict[str, Tensor]]:
    """For a time: weights and their gradients, as a step finds them, and the batch that is given. What the CPU works
    out in runs on GPUs (patches, positions) takes none of their memory; positions are the same for all groups.
    """
    weights = {name: torch.empty_like(p, device="cpu") for name, p in model.named_parameters()}
    with (
        _with_weights(model, weights),
        _training(model, job),
        mock.patch.object(varlen, "forward", hollow.attend),
        mock.patch.object(varlen, "backward", hollow.attend_backward),
        mock.patch.object(patches, "cut_patches", hollow.aside(patches.cut_patches, _arguments)),
        mock.patch.object(composite, "positions_of_all", hollow.aside(composite.positions_of_all, _itself, once=True)),
        mock.patch.object(offload, "save_on_cpu", _Elsewhere),
    ):
        yield make_batch(model, job) if batch is None else {name: _on_cpu(x) for name, x in batch.items()}


def _arguments(made: patches.Patches) -> list[Tensor]:
    return list(made.arguments.values())


def _itself(made: Tensor) -> list[Tensor]:
    return [made]


def _follow(
    model: nn.Module,
    hollow: Hollow,
    batch: dict[str, Tensor],
    job: Job,
    group: tuple[int, int],
    config: SPConfig | None,
) -> tuple[Forecast, Installation]:
    """A step of one rank of a group, (ranks, rank)."""
    options = asdict(config or SPConfig(link="nvlink")) | {"check": "off", "trial": "off", "single": True}
    asked = {"chunked_loss": job.chunked_loss, "tiled_mlp": job.tiled_mlp, "offload": job.offload}
    options |= {name: value for name, value in asked.items() if value}
    link = find_link(options["link"], "cuda", group[0])
    with _alone_among(*group), collectives.record() as ledger:
        installation = installation_of(wrap(model, config=SPConfig(**options)))
        assert installation is not None
        installation.state.calls = 1  # in a first call ranks compare their weights
        alike = Alike(hollow, ledger, installation)
        hollow.flops, before, hollow.peak = 0, hollow.now, hollow.now
        with alike.following():
            with saved_activations(model) as saved:
                loss = model(**batch).loss
            require(loss is not None, InputError, "labels", "labels in the batch", "none", "a step needs a loss")
            forward, hollow.peak, sent = hollow.peak - before, hollow.now, sum(_sent(ledger))
            loss.backward()
        backward = hollow.peak - before
        plans, own = _plans(installation)
        del loss
        unwrap(model)
    weights = list(model.parameters())
    states = engine_bytes(sum(p.nbytes for p in weights), sum(p.numel() for p in weights), job)
    tokens = next(int(batch[name].shape[:2].numel()) for name in ("input_ids", "inputs_embeds") if name in batch)
    step = _sent(ledger)
    seconds = hollow.flops / link.compute + sum(step) / link.bandwidth + len(step) * link.latency
    sizes = (saved[0], forward, backward, installation.offloaded, sum(states) + max(forward, backward), sent, sum(step))
    row = Forecast(*group, tokens, own, plans, *states, *sizes, hollow.flops, seconds)
    return row, installation


def _sent(ledger: collectives.Ledger) -> list[int]:
    """The bytes of each collective, without those in which ranks compare what they were given."""
    return [size for name, size in ledger.entries if name != "agree"]


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _plans(installation: Installation) -> tuple[dict[str, str], int]:
    decoder = installation.anatomy.decoder
    assert decoder is not None
    calls = installation.last_calls
    return {name: call.choice.plan for name, call in calls.items()}, calls[decoder.name].choice.shards.sizes[
        installation.group.rank
    ]


def engine_bytes(size: int, count: int, job: Job) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and AdamW's states that an engine leaves on a GPU, of `count` parameters.

    >>> engine_bytes(200, 100, Job(gpus=4, engine="zero2"))
    (200, 50, 300)
    """
    parts, engine = job.gpus, job.engine
    if engine == "ddp":
        return size, size, 2 * size
    whole = engine in ("zero3", "fsdp")
    gradients = size if engine == "zero1" else -(-size // parts)
    return -(-size // parts) if whole else size, gradients, -(-12 * count // parts)


@contextmanager
def _training(model: Any, job: Job) -> Iterator[None]:
    """In training mode, with checkpointing if the job has it; afterwards as before."""
    mode = model.training
    model.train()
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        model.train(mode)
        if job.checkpointing:
            model.gradient_checkpointing_disable()


@contextmanager
def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """For a time: other parameters in their places, whose gradients are there already, and buffers as the model makes
    them on the CPU."""
    kept = list(_parameters(model))
    fresh = {name: nn.Parameter(weights[name], requires_grad=p.requires_grad) for _, name, _, p in kept}
    for parameter in fresh.values():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    buffers = [(module, key, b) for module in model.modules() for key, b in module._buffers.items() if b is not None]
    for module, name, key, _ in kept:
        module._parameters[key] = fresh[name]
    for module, key, buffer in buffers:
        module._buffers[key] = torch.empty_like(buffer, device="cpu")
    try:
        yield
    finally:
        for module, _, key, p in kept:
            module._parameters[key] = p
        for module, key, buffer in buffers:
            module._buffers[key] = buffer


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """(module, name in the model, name in the module, parameter), each once; tied ones under their first name."""
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                yield module, names[id(p)], key, p


class _Elsewhere:
    """In the place of torch's `save_on_cpu`: what is in CPU memory takes none of a GPU's."""

    def __init__(self, pin_memory: bool) -> None:
        self.pack_hook, self.unpack_hook = form_of, Form.new


@contextmanager
def _alone_among(ranks: int, rank: int) -> Iterator[None]:
    """This process as one rank of a group whose other ranks do not exist: nothing arrives from them. Where images are
    shared out, the others are taken to make equal parts of the features that are left."""

    def made_by_all(rows: int, needed: Shards, _: Any) -> Shards:
        others = iter(shard_tokens(needed.total - rows, max(ranks - 1, 1)).sizes)
        return Shards(tuple(rows if other == rank else next(others) for other in range(ranks)))

    with groups.fake_world(ranks, rank), mock.patch.object(features, "made_by_all", made_by_all):
        yield
