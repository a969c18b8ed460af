"""The wrapped model's own forward: read the batch, lay it out, run the model on this rank's part, form the loss."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from triton_sp.anatomy.parts import Stack
from triton_sp.errors import InputError
from triton_sp.loss import cross_entropy, mean_of_shares
from triton_sp.ranks import collectives
from triton_sp.ranks.backwards import BackwardWatcher, noting_backwards
from triton_sp.ranks.boards import board_of, give_sign
from triton_sp.ranks.failures import reporting_failures
from triton_sp.wrappers.fusion.features import check_rows, needed_rows
from triton_sp.wrappers.generation import Prompt, generating, prefill, prefills
from triton_sp.wrappers.graphs import has_graphs
from triton_sp.wrappers.inputs.batch import Batch, check_pixels_alone, decodes, read_batch
from triton_sp.wrappers.inputs.described import agree_on_backward, bind_on_all, prepare_on_all
from triton_sp.wrappers.inputs.kept import lay_out_batch
from triton_sp.wrappers.inputs.layout import TextCall, gather_tokens
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.losses.head import HeadLoss, logit_transform
from triton_sp.wrappers.losses.routers import ARGUMENT, Balance, balance_of
from triton_sp.wrappers.losses.scores import ScoreRequest, answer, requested
from triton_sp.wrappers.proof.first_call import try_text_model, try_vision_model
from triton_sp.wrappers.proof.verification import next_proof
from triton_sp.wrappers.scope import Call, active


def run_model(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The forward of a wrapped model. In `generate`, and with a key/value cache, it is the model's own."""
    installation = override.installation
    if generating() and not prefills(installation, kwargs):  # perhaps on one rank: the others are not asked anything
        give_sign(installation.group)
        return override.original(*args, **kwargs)
    board = board_of(installation.group)
    board.begin("a forward", installation.config.heartbeat)
    installation.offloaded = 0
    arguments = bind_on_all(override, args, kwargs)
    decoder = installation.anatomy.decoder
    prompt = Prompt.take(arguments, installation.anatomy) if generating() else None
    if decoder is not None and decodes(override, arguments):
        give_sign(installation.group)
        return override.original(*args, **kwargs)
    installation.proof = next_proof(installation)
    with reporting_failures(board), noting_backwards() as exchanges:
        if decoder is None:
            out = _run_vision_model(override, arguments, args, kwargs)
        else:
            out = _run_text_model(override, arguments, decoder, prompt)
    begin = None
    if installation.config.check != "off":
        step = f"backward of forward {installation.state.calls} of {type(override.module).__name__}"
        # A rank may run a compiled layer as it is, where torch gives up compiling, and the others its graph.
        counted = None if has_graphs(override.module) else exchanges
        begin = partial(agree_on_backward, installation, step, counted)
    _watch(out, BackwardWatcher(board, begin))
    return out


def _watch(out: Any, hook: BackwardWatcher) -> None:
    """Let the backward of an output be watched, wherever it begins."""
    if isinstance(out, Tensor):
        if out.requires_grad:
            out.register_hook(hook)
    elif isinstance(out, Mapping):
        for value in out.values():
            _watch(value, hook)
    elif type(out) in (list, tuple) or hasattr(out, "_fields"):  # not TowerStates, where reading an entry gathers it
        for value in out:
            _watch(value, hook)


# --- vision alone --------------------------------------------------------------------------------------------------


def _run_vision_model(override: Override, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """The outputs are the same on every rank, and so is a loss that the caller forms of them."""
    installation = override.installation
    prepare_on_all(installation, arguments, partial(check_pixels_alone, installation.anatomy, arguments))
    try_vision_model(override, arguments, args, kwargs)
    with active(Call()):
        out = override.original(*args, **kwargs)
    factor = 1.0 if installation.config.gradient == "mean" else 1.0 / installation.group.size
    return _scale_outputs(out, factor)


def _scale_outputs(out: Any, factor: float) -> Any:
    """All ranks form the same loss, so each rank's backward gives the full gradient. Where an engine adds them up
    ("sum"), each is scaled to a P-th."""
    if factor == 1.0 or out is None or isinstance(out, bool | int | float | str):
        return out
    if isinstance(out, Tensor):
        return collectives.scale_gradient(out, factor) if out.requires_grad else out
    if isinstance(out, MutableMapping):
        for name, value in out.items():
            out[name] = _scale_outputs(value, factor)
        return out
    if isinstance(out, list | tuple):
        scaled = [_scale_outputs(value, factor) for value in out]
        return scaled if isinstance(out, list) else tuple(scaled)
    raise InputError(
        "SPConfig.gradient",
        expected="'mean' for a model whose outputs are not tensors, lists, tuples and mappings",
        found=f"'sum' and an output of type {type(out).__name__}",
        remedy="use SPConfig(gradient='mean')",
    )


# --- with a decoder ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """One forward before anything is sent: the batch, where its tokens go, and what is wanted besides the loss."""

    batch: Batch
    call: TextCall
    request: ScoreRequest | None
    balance: Balance | None
    prompt: Prompt | None

    def plan(self) -> str:
        """What must be equal on all ranks, because each has decided it by itself."""
        stream, asked = self.call.stream, (self.request or "", self.prompt and self.prompt.keep)
        needed = {name: shards.sizes for name, shards in self.call.needed.items()}
        return f"{self.call.choice.plan} {stream.shards.sizes} {needed} {stream.host_segments} {asked}"


def _prepare(override: Override, arguments: dict[str, Any], decoder: Stack, prompt: Prompt | None) -> Prepared:
    installation, fusion = override.installation, override.installation.anatomy.fusion
    request = requested(override, arguments)
    batch = read_batch(override, arguments, decoder)
    if prompt is not None:
        batch = prompt.of(batch)
    kept = replace(batch, mask=None) if decoder.gathered else batch  # it is not known who sees padding there
    call = lay_out_batch(installation, decoder, kept)
    if fusion is not None and all(arguments.get(name) is None for name in fusion.gathered):
        needed = needed_rows(fusion, batch.tokens, call.index, call.stream.shards)
        call = replace(call, needed=needed, routes=bool(needed))
        check_rows(installation, arguments, call.needed)
    balance = balance_of(override.module, arguments.get(ARGUMENT), request)
    return Prepared(batch, replace(call, records_routers=balance is not None), request, balance, prompt)


def _run_text_model(override: Override, arguments: dict[str, Any], decoder: Stack, prompt: Prompt | None) -> Any:
    installation = override.installation
    prepare = partial(_prepare, override, arguments, decoder, prompt)
    prepared = prepare_on_all(installation, arguments, prepare, Prepared.plan)
    batch, call, balance = prepared.batch, prepared.call, prepared.balance
    inputs = _inputs(arguments, prepared, decoder)
    if prompt is not None:
        return prefill(override, inputs, call, prompt)
    try_text_model(override, arguments, inputs, batch, call)
    if prepared.request is not None and batch.labels is not None and batch.targets is not None:
        inputs["num_items_in_batch"] = batch.items
        return answer(override, inputs, call, batch.labels, batch.targets, prepared.request)
    local_T = None if batch.targets is None else batch.targets.flatten()[call.local_index]
    head_loss = _head_loss(override, local_T)
    with active(call), head_loss.active() if head_loss else nullcontext():
        out = override.original(**inputs, return_dict=True)
    fields = dict(out.items())
    if local_T is not None:
        fields = {"loss": _loss(fields, local_T, head_loss, batch.label_count, installation), **fields}
    if balance is not None:
        keep_T = None if batch.mask is None else batch.mask.flatten()[call.local_index]
        fields |= balance.fields(fields, keep_T, installation)
    if installation.config.gather_logits and head_loss is None:
        name = "logits" if "logits" in fields else "last_hidden_state"
        fields[name] = gather_tokens(fields[name], call, installation)
    out = type(out)(**fields)
    as_tuple = arguments.get("return_dict", getattr(override.module.config, "return_dict", True)) is False
    return out.to_tuple() if as_tuple else out


def _inputs(arguments: dict[str, Any], prepared: Prepared, decoder: Stack) -> dict[str, Any]:
    """What the model's own forward gets: the arguments, without those from which the loss is formed here."""
    used, changed = {"labels", "num_items_in_batch", "return_dict"}, dict[str, Any](use_cache=False)
    if decoder.spans is not None:  # it would make a mask (B, 1, S, S) of the types
        used.add("token_type_ids")
        changed["attention_mask"] = prepared.call.mask
    if prepared.balance is not None:  # the decoder is asked for its routers' logits, but no loss is made of a part
        changed[ARGUMENT] = False
    return {name: value for name, value in arguments.items() if name not in used} | changed


def _loss(
    fields: dict[str, Any], local_T: Tensor, head_loss: HeadLoss | None, count: Tensor | int, installation: Installation
) -> Tensor:
    """The loss of the batch, from what the model has returned for this rank's tokens. Without logits if its head has
    computed this rank's share: `fields` has none then."""
    if head_loss is None:
        share = cross_entropy(fields["logits"].flatten(0, 1), local_T, installation.config.label_smoothing)
    else:
        share = head_loss.take(fields.pop("logits"), check=not installation.head_verified)
        installation.head_verified = True
    return mean_of_shares(share, count, installation.group, installation.config.gradient)


def _head_loss(override: Override, targets_T: Tensor | None) -> HeadLoss | None:
    """What computes the loss inside the model's head, if the settings and this call ask for it."""
    model: Any = override.module
    config = override.installation.config
    if targets_T is None or not config.chunked_loss or not model.training:
        return None
    return HeadLoss(model.get_output_embeddings(), targets_T, logit_transform(model), config.label_smoothing)
