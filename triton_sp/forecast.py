"""`triton-sp plan`: what each rank will hold and send, before any GPU is rented.

The wrapped model itself is run for a forward, on rank 0 of a group of which the other ranks do not exist, with tensors
that have shapes and no numbers (hollow.py): whatever decides about shards, heads and routes is the code that decides in
the real run. Attention is taken to save its output and the log-sum-exp, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from triton_sp.api import unwrap, wrap
from triton_sp.config import SPConfig
from triton_sp.errors import InputError
from triton_sp.hollow import Hollow
from triton_sp.ops import varlen
from triton_sp.ranks import collectives, groups
from triton_sp.testing import saved_activations
from triton_sp.wrappers.install import Installation, installation_of

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Job:
    """One step of training.

    Attributes:
        gpus: of the whole job, over which ZeRO and FSDP shard.
        text: tokens of text in the row.
        images: how many, each of `height` x `width` pixels.
        engine: one of ENGINES.
        checkpointing: whether layers are recomputed in the backward.
        chunked_loss: whether the loss is computed without all logits.
    """

    gpus: int
    text: int
    images: int = 0
    height: int = 0
    width: int = 0
    engine: str = "ddp"
    checkpointing: bool = False
    chunked_loss: bool = False


@dataclass(frozen=True)
class Forecast:
    """What rank 0 of a group of `ranks` will have. Sizes are in bytes.

    Attributes:
        tokens: of the batch, and `own_tokens` those of this rank.
        plans: of each stack, by its name.
        parameters, gradients, optimizer: what the engine leaves on a rank, of AdamW. ZeRO's and FSDP's states are in
            fp32 beside a master copy, DDP's in the dtype of the parameters.
        activations: what the forward saves for the backward.
        forward_peak: activations, and the most that lives beside them while the forward runs.
        total: parameters, gradients, optimizer and forward_peak. The backward's own peak is not in it.
        sent: by this rank to others in the forward.
    """

    ranks: int
    tokens: int
    own_tokens: int
    plans: dict[str, str]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    forward_peak: int
    total: int
    sent: int


def load_model(source: str | Path) -> nn.Module:
    """A model without weights, of the configuration in a folder or file (or on the Hub, where there is a network).

    Raises:
        InputError: it is the configuration of no model that generates text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config, dtype=torch.bfloat16)
    raise InputError(
        "configuration",
        expected="that of a language model, or of a vision and language model",
        found=type(config).__name__,
        remedy="give the folder of the whole model",
    )


def make_batch(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """One row as the model's processor would make it: the images, each behind a token of text, then the text.

    Raises:
        InputError: images for a model whose processor takes others than grids of patches.
    """
    ids = torch.full((1, job.text), 5)
    if not job.images:
        return {"input_ids": ids, "labels": ids}
    config: Any = getattr(model, "config", None)
    vision: Any = getattr(config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is None or not hasattr(config, "image_token_id"):
        raise InputError(
            "images",
            expected="a model that takes patches of images of any size (Qwen-VL, GLM-4V)",
            found=type(model).__name__,
            remedy="plan its text alone; this model's images are not planned yet",
        )
    patch, frames = vision.patch_size, getattr(vision, "temporal_patch_size", 1)
    height, width = (max(round(side / patch / merge), 1) * merge for side in (job.height, job.width))
    image = torch.full((1, height * width // merge**2), config.image_token_id)
    ids = torch.cat([*([ids[:, :1], image] * job.images), ids], 1)
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == config.image_token_id, -100),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.zeros(job.images * height * width, channels * frames * patch**2, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, height, width]] * job.images),
    }


def forecast(model: nn.Module, job: Job, ranks: Sequence[int], config: SPConfig | None = None) -> list[Forecast]:
    """What a step will need, for each of these sizes of a group.

    Args:
        model: not wrapped; its weights are neither read nor changed, and may be on the meta device.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(tiny)
    >>> [(row.own_tokens, row.plans) for row in forecast(model, Job(gpus=2, text=101), [2])]
    [(51, {'model.layers': 'heads'})]
    """
    if job.engine not in ENGINES:
        raise InputError("engine", expected=f"one of {ENGINES}", found=job.engine, remedy="give one of them")
    return [_forecast(model, job, size, config) for size in ranks]


def _forecast(model: nn.Module, job: Job, ranks: int, config: SPConfig | None) -> Forecast:
    options = asdict(config or SPConfig(link="nvlink")) | {"check": "off", "single": True}
    if job.chunked_loss:
        options["chunked_loss"] = True
    with Hollow() as hollow, _alone_among(ranks), collectives.record() as ledger:
        weights = {name: torch.empty_like(p, device="cpu") for name, p in model.named_parameters()}
        with _with_weights(model, weights):
            model.train()
            if job.checkpointing:
                model.gradient_checkpointing_enable()  # type: ignore[operator]
            batch = make_batch(model, job)
            wrap(model, config=SPConfig(**options))
            before, hollow.peak = hollow.now, hollow.now
            with saved_activations(model) as saved:
                loss = model(**batch).loss
            peak = hollow.peak - before
            installation = installation_of(model)
            assert installation is not None
            plans, own = _plans(installation)
            tokens = int(batch["input_ids"].numel())
            del loss
            unwrap(model)
            if job.checkpointing:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
    states = engine_bytes(sum(p.nbytes for p in weights.values()), sum(p.numel() for p in weights.values()), job)
    total = sum(states) + peak
    return Forecast(ranks, tokens, own, plans, *states, saved[0], peak, total, ledger.bytes)


def _plans(installation: Installation) -> tuple[dict[str, str], int]:
    decoder = installation.anatomy.decoder
    assert decoder is not None
    calls = installation.last_calls
    return {name: call.choice.plan for name, call in calls.items()}, calls[decoder.name].choice.shards.sizes[0]


def engine_bytes(size: int, count: int, job: Job) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and AdamW's states that an engine leaves on a GPU, of `count` parameters.

    >>> engine_bytes(200, 100, Job(gpus=4, text=1, engine="zero2"))
    (200, 50, 300)
    """
    parts, engine = job.gpus, job.engine
    if engine == "ddp":
        return size, size, 2 * size
    whole = engine in ("zero3", "fsdp")
    gradients = size if engine == "zero1" else -(-size // parts)
    return -(-size // parts) if whole else size, gradients, -(-12 * count // parts)


@contextmanager
def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """For a time: other parameters in their places, and buffers as the model makes them on the CPU."""
    kept = list(_parameters(model))
    fresh = {name: nn.Parameter(weights[name], requires_grad=p.requires_grad) for _, name, _, p in kept}
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


@contextmanager
def _alone_among(ranks: int) -> Iterator[None]:
    """This process as rank 0 of a group whose other ranks do not exist: nothing arrives from them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return varlen.empty_results(q, k, v)

    with groups.fake_world(ranks), mock.patch.object(varlen, "forward", attend):
        yield
