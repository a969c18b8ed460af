"""What users call: wrap and unwrap, which install overrides and undo them; log_probs and sync_gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from triton_sp.anatomy.find import find_parts
from triton_sp.config import SPConfig
from triton_sp.errors import GroupError, InputError, UnsupportedModelError
from triton_sp.ranks import collectives, groups
from triton_sp.ranks.boards import board_of
from triton_sp.ranks.failures import reporting_failures
from triton_sp.wrappers import entry, generation
from triton_sp.wrappers.decoders import decoder, gathered
from triton_sp.wrappers.fusion import composite
from triton_sp.wrappers.inputs.described import agree_on_gradients
from triton_sp.wrappers.install import Installation, attach, installation_of
from triton_sp.wrappers.layers import tiled_mlp
from triton_sp.wrappers.losses.scores import ScoreRequest, TokenScores, asking, score_alone
from triton_sp.wrappers.towers import vision

Model = TypeVar("Model", bound=nn.Module)


def wrap(model_: Model, group: Any = None, config: SPConfig | None = None) -> Model:
    """Make a model train sequence-parallel on the ranks of a group. The model is changed in place.

    From then on every rank calls the model with the same, whole batch. Vision towers and the decoder compute on this
    rank's tokens, and exchange tokens for heads in attention (Ulysses, arXiv:2309.14509). `out.loss` is the loss of the
    whole batch, on every rank. `out.logits` holds the logits of this rank's tokens, (1, T, V) without padding, or all
    of them if `config.gather_logits`. `generate` (unless `config.shard_prefill`) and calls of inner modules in eval
    mode or under no_grad run as before, not sharded, each rank by itself. Inner modules that are called directly in
    training with gradients raise.

    Args:
        model_: a Hugging Face model, a module around one (PEFT), or a plain module with a stack of attention blocks.
        group: the ranks that share each batch: a ProcessGroup, a DeviceMesh (with one axis, or its axis "sp"), an
            object with `get_sequence_parallel_group()`, or None for all ranks.
        config: the settings, see SPConfig.

    Returns:
        The same object. Parameter names, state_dict keys and classes are unchanged. Wrapping it again with the same
        group and settings does nothing, except that our forward is put in front of one that a trainer has put over it.

    Raises:
        GroupError: there is no group that can be used.
        InputError: `model_` is not a module, or is wrapped with other settings already; or `config.attention` names
            what is not installed.
        UnsupportedModelError: a part cannot be sharded correctly. The error names the module and the remedy.

    >>> import torch, torch.distributed as dist
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = wrap(LlamaForCausalLM(tiny))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> model(input_ids=ids, labels=ids).loss.backward()
    >>> dist.destroy_process_group()
    """
    config = config or SPConfig()
    if not isinstance(model_, nn.Module):
        raise InputError("model", expected="an nn.Module", found=type(model_).__name__, remedy="pass the model itself")
    if not isinstance(config, SPConfig):
        raise InputError("config", expected="an SPConfig", found=type(config).__name__, remedy="SPConfig(...)")
    resolved = groups.resolve_group(group)
    if config.gradient == "auto":
        config = replace(config, gradient=_mean_if_known(group))
    present = installation_of(model_)
    if present is not None:
        if (present.group, present.config) == (resolved, config):
            present.return_to_front()
            return model_
        raise InputError(
            "model",
            expected=f"a model that is not wrapped, or with {present.config} on group {present.group.name!r}",
            found=f"{config} on group {resolved.name!r}",
            remedy="call triton_sp.unwrap(model) first",
        )
    anatomy = find_parts(model_)
    for stack in anatomy.stacks:
        if stack.refusal is not None:
            raise stack.refusal
    installation = Installation(resolved, config, anatomy)
    if not installation.idle:
        _install(installation)
        board_of(resolved).begin("wrap", config.heartbeat)
    attach(anatomy.entry, installation)
    return model_


def _install(installation: Installation) -> None:
    anatomy = installation.anatomy
    for tower in anatomy.towers:
        vision.install(tower, installation)
    if anatomy.decoder is not None:
        (gathered if anatomy.decoder.gathered else decoder).install(anatomy.decoder, installation)
    if anatomy.fusion is not None and anatomy.fusion.features:
        composite.install(anatomy.fusion, installation)
    if installation.config.tiled_mlp:
        tiled_mlp.install(installation)
    installation.override(anatomy.entry, entry.run_model)
    generation.install(installation)


def _mean_if_known(group: Any) -> Literal["mean"]:
    if groups.adds_in_part(group):
        raise InputError(
            "SPConfig.gradient",
            expected="'sum' (ZeRO 0, 1 and 2 add over the ranks of this mpu) or 'mean' (ZeRO 3 averages)",
            found="'auto', and an mpu that does not say which",
            remedy="say which, or pass triton_sp.mpu(group) to wrap and to deepspeed.initialize: all stages average",
        )
    return "mean"


def unwrap(model_: Model) -> Model:
    """Undo `wrap` and return the same object, with exactly the forward that it had before.

    It does nothing to a model that is not wrapped.

    Raises:
        SPError: something else has replaced a forward after `wrap`, and must be removed first.
    """
    installation = installation_of(model_)
    if installation is not None:
        installation.undo()
    return model_


def sync_gradients(model_: nn.Module, group: Any = None) -> None:
    """Give every `.grad`, on every rank, the value that it has in one process. For plain training loops.

    Call it on all ranks after the backward. With one group, `.grad` becomes the gradient of the loss of its batch. With
    several groups, each with a batch of its own, it becomes the gradient of the mean of their losses, as with DDP. A
    parameter that has no gradient on any rank keeps none. Do not call it with engines that combine gradients
    themselves (DDP, FSDP, DeepSpeed).

    Args:
        model_: a wrapped model.
        group: all ranks that train the model, of all groups: a ProcessGroup, a DeviceMesh with one axis, or None for
            all ranks.

    Raises:
        GroupError: the model is not wrapped, or there is no group that can be used.
        DisagreementError: the ranks are about to add up gradients of different parameters.
    """
    installation = installation_of(model_)
    if installation is None:
        raise GroupError("model", expected="a wrapped model", found="one without a group", remedy="call wrap first")
    everyone = groups.resolve_everyone(group)
    added = 1 if installation.config.gradient == "mean" else installation.group.size
    parameters = [p for p in model_.parameters() if p.requires_grad]
    with reporting_failures(board_of(everyone)):
        agree_on_gradients(installation, parameters, everyone)
        collectives.all_reduce_gradients(parameters, everyone, added / everyone.size)


def log_probs(model_: nn.Module, batch: Mapping[str, Any], *, temperature: float = 1.0) -> TokenScores:
    """The log-probability of each label of a batch, and more, on every rank and with a gradient; no loss, no logits.

    DPO, GRPO and other losses of one's own are formed of these, by each rank from all of them: then the mean of the
    ranks' gradients is the single-process gradient, as with `out.loss`. The sequence is sharded as ever, and the head
    runs on a chunk of the labelled tokens at a time, and again in the backward.

    Args:
        model_: a wrapped language model, or vision and language model; or what an engine has put around it (DDP, PEFT).
        batch: the arguments of its forward, the same on every rank. `labels` (B, S): the tokens to be judged, often the
            `input_ids`, and -100 elsewhere.
        temperature: what logits are divided by.

    Returns:
        TokenScores: `log_probs`, `entropy`, `is_top1` and `label_mask`, each (B, S - 1): entry i is of
        `labels[:, i + 1]`.

    Raises:
        GroupError: the model is not wrapped.
        InputError: no labels, a temperature that is not positive, or a batch that cannot be sharded.
        UnsupportedModelError: a model without a head, or one that does to its logits what its configuration does not
            say.

    >>> import torch, torch.distributed as dist, triton_sp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = triton_sp.wrap(LlamaForCausalLM(tiny))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> scores = triton_sp.log_probs(model, {"input_ids": ids, "labels": ids})
    >>> scores.log_probs.shape, bool((scores.log_probs < 0).all())
    (torch.Size([1, 2]), True)
    >>> (-scores.log_probs.mean()).backward()
    >>> dist.destroy_process_group()
    """
    installation = installation_of(model_)
    if installation is None:
        raise GroupError("model", expected="a wrapped model", found="one without a group", remedy="call wrap first")
    entry: Any = installation.anatomy.entry
    if installation.anatomy.decoder is None or getattr(entry, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            type(entry).__name__,
            expected="a model with a language-modelling head",
            found="none",
            remedy="wrap the whole model, e.g. LlamaForCausalLM",
        )
    if not temperature > 0:
        raise InputError(
            "temperature", expected="a positive number", found=f"{temperature}", remedy="1.0 changes nothing"
        )
    if not isinstance(batch.get("labels"), Tensor):
        raise InputError(
            "labels", expected="a tensor (B, S)", found="none", remedy="input_ids, with -100 where no score is wanted"
        )
    request = ScoreRequest(float(temperature))
    if installation.idle:
        return score_alone(installation, model_, dict(batch), request)
    with asking(request):
        return model_(**batch)
