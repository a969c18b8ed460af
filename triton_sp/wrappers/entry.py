"""The wrapped model's own forward: check the batch, lay it out, run the model on this rank's part, form the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_sp._version import __version__
from triton_sp.anatomy.parts import Spans, device_of
from triton_sp.errors import InputError
from triton_sp.loss import IGNORE, mean_of_shares, sharded_cross_entropy, shift
from triton_sp.plan.cost import find_link
from triton_sp.ranks import collectives
from triton_sp.ranks.agreement import agree
from triton_sp.ranks.failures import BackwardWatcher, reporting_failures
from triton_sp.wrappers.decoder import TextCall, gather_tokens, lay_out
from triton_sp.wrappers.features import check_rows, needed_rows
from triton_sp.wrappers.head import HeadLoss, causal_lm_loss, logit_transform
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.masks import documents_of
from triton_sp.wrappers.planning import plan_decoder
from triton_sp.wrappers.routers import ARGUMENT, Balance, balance_of
from triton_sp.wrappers.scope import Call, active
from triton_sp.wrappers.scores import answer, requested

# Integer tensors up to so many elements are compared by value, others by shape. With check="first" grids of images
# still are: towers make their plans of them.
_CHECKED_VALUES, _ALWAYS_CHECKED = 1 << 22, 1 << 10
_CACHES = ("past_key_values", "cache")  # the second from transformers 5.24 on, which takes both


def run_model(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The forward of a wrapped model. With a key/value cache it is the model's own."""
    installation = override.installation
    arguments = _bind(override, args, kwargs)
    with_decoder = installation.anatomy.decoder is not None
    if with_decoder and _decodes(override, arguments):
        return override.original(*args, **kwargs)
    board = collectives.board_of(installation.group)
    with reporting_failures(board):
        if with_decoder:
            out = _run_text_model(override, arguments)
        else:
            out = _run_vision_model(override, arguments, args, kwargs)
    _watch(out, BackwardWatcher(board))
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


def _bind(override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. A rank whose call does not fit the model's signature must not leave the others waiting."""
    try:
        return override.bind(args, kwargs)
    except TypeError as error:
        failure = error  # Python forgets `error` here

    def refuse() -> None:
        name = type(override.module).__name__
        raise InputError(
            f"arguments of {name}", expected=f"{override.__signature__}", found=str(failure), remedy="correct the call"
        ) from failure

    _agree(override.installation, {}, refuse)
    raise failure


def _agree(installation: Installation, arguments: dict[str, Any], check: Callable[[], str | None]) -> None:
    """`check` validates the batch, and may return its plan."""
    if installation.config.check == "off":
        check()
        return

    def describe(most: int = _CHECKED_VALUES) -> str:
        plan = check()
        return f"{_describe(installation, arguments, most)}\nplan={plan or ''}"

    brief = partial(describe, _ALWAYS_CHECKED) if installation.config.check == "first" else None
    agree(installation.group, describe, brief, installation.agreed)


def _describe(installation: Installation, arguments: dict[str, Any], most: int) -> str:
    """What must be equal on all ranks, a line a field; tensors of up to `most` elements by content."""
    model = installation.anatomy.entry
    lines = [f"triton_sp={__version__}", f"model={type(model).__name__}", f"config={installation.config}"]
    lines += [f"training={model.training}", f"grad={torch.is_grad_enabled()}"]
    # Calibrated on each host: where they differ, plans would.
    lines.append(f"link={find_link(installation.config.link, device_of(model).type, installation.group.size)}")
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            lines.append(f"{name}={tuple(value.shape)} {str(value.dtype)[6:]}{_digest(value, most)}")
        elif value is not None and not isinstance(value, Mapping | list | tuple):
            lines.append(f"{name}={value!s:.40}")
    return "\n".join(lines)


def _digest(value: Tensor, most: int) -> str:
    """Ids, labels, masks and grids by content: they decide every rank's plan."""
    if value.is_floating_point() or value.numel() > most:
        return ""
    return " " + hashlib.blake2s(value.detach().cpu().contiguous().numpy().tobytes(), digest_size=6).hexdigest()


# --- vision alone --------------------------------------------------------------------------------------------------


def _run_vision_model(override: Override, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """Outputs are whole on every rank, and so is a loss that the caller forms of them."""
    installation = override.installation
    _agree(installation, arguments, lambda: _refuse(arguments, "output_attentions"))
    with active(Call()):
        out = override.original(*args, **kwargs)
    factor = 1.0 if installation.config.gradient == "mean" else 1.0 / installation.group.size
    return _scale_outputs(out, factor)


def _scale_outputs(out: Any, factor: float) -> Any:
    """Every rank will send the whole gradient back through what it holds; under "sum" each counts for its share."""
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


def _decodes(override: Override, arguments: dict[str, Any]) -> bool:
    """Whether the call reads or writes a key/value cache, which holds whole sequences."""
    if override.module.training and torch.is_grad_enabled():
        return False  # a step of training: _check_batch refuses a cache there
    return bool(arguments.get("use_cache")) or any(arguments.get(name) is not None for name in _CACHES)


def _refuse(arguments: dict[str, Any], *names: str) -> None:
    remedies = {
        "output_attentions": "attention weights are never formed; call triton_sp.unwrap(model) to look at them",
        "output_hidden_states": "take last_hidden_state of the model without its head",
        "logits_to_keep": "out.logits holds this rank's tokens only; select from SPConfig(gather_logits=True)",
        "shift_labels": "pass labels; they are shifted on the whole sequence before it is sharded",
    }
    for name in names:
        value = arguments.get(name)
        if value is not None and not (isinstance(value, (bool, int)) and value == 0):
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(name, expected="it left out", found=shown, remedy=remedies[name])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _check_batch(override: Override, arguments: dict[str, Any]) -> tuple[int, int]:
    """(B, S) of a batch whose fields fit one another."""
    _refuse(arguments, "output_attentions", "output_hidden_states", "logits_to_keep", "shift_labels")
    for name in ("use_cache", *_CACHES):
        if arguments.get(name) not in (None, False):
            raise InputError(
                name,
                expected=f"{name} left out in training",
                found=f"{arguments[name]!s:.40}",
                remedy="a cache holds whole sequences; use it in eval mode or under torch.no_grad()",
            )
    given = [name for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
    if not given:
        raise InputError("input_ids", expected="ids or inputs_embeds", found="neither", remedy="pass one of them")
    tokens, axes = arguments[given[0]], 2 if given[0] == "input_ids" else 3
    if not isinstance(tokens, Tensor) or tokens.ndim != axes or tokens.is_floating_point() != (axes == 3):
        expected = "integers (B, S)" if axes == 2 else "embeddings (B, S, C)"
        raise InputError(given[0], expected=expected, found=_shown(tokens), remedy="pass a batch of token ids")
    rows, length = tokens.shape[:2]
    for name in ("attention_mask", "labels", "token_type_ids"):
        value = arguments.get(name)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != (rows, length)):
            expected = f"a tensor of shape {(rows, length)}"
            raise InputError(name, expected=expected, found=_shown(value), remedy="give one entry a token")
    positions = arguments.get("position_ids")
    if positions is None and arguments.get("cu_seq_lens_q") is not None:
        raise InputError(
            "cu_seq_lens_q", expected="position_ids beside it", found="none", remedy="mark documents by position_ids"
        )
    if positions is not None and (positions.ndim not in (2, 3) or positions.shape[-1] != length):
        raise InputError(
            "position_ids",
            expected=f"(B, {length}), (1, {length}) or (axes, B, {length})",
            found=f"{tuple(positions.shape)}",
            remedy="give the positions of the whole sequence",
        )
    labelled = arguments.get("labels") is not None
    trained = override.module.training and not override.installation.config.gather_logits
    if not labelled and trained and arguments.get("num_items_in_batch") is not None:
        raise InputError(
            "num_items_in_batch",
            expected="labels beside it",
            found="none: a trainer forms the loss from out.logits itself, which hold this rank's tokens",
            remedy="smooth labels by SPConfig(label_smoothing=...) and leave label_smoothing_factor 0; for another "
            "loss of your own, SPConfig(gather_logits=True)",
        )
    if labelled and not causal_lm_loss(override.module):
        raise InputError(
            "labels",
            expected="a model whose loss is the shifted cross entropy",
            found=f"{override.module.loss_type} loss",
            remedy="compute the loss from the outputs (SPConfig(gather_logits=True))",
        )
    return rows, length


def _mutual(spans: Spans | None, arguments: dict[str, Any]) -> Tensor | None:
    """(B, S), the tokens that see one another in runs, as the model itself would take it from token_type_ids."""
    types = arguments.get("token_type_ids")
    if spans is None or types is None:
        if spans is not None and spans.required:
            raise InputError(
                "token_type_ids",
                expected="them beside input_ids: without, this model's attention depends on padding and implementation",
                found="none",
                remedy=f"pass the processor's: {spans.token_type} at the tokens that see one another",
            )
        return None
    return types == spans.token_type


def _run_text_model(override: Override, arguments: dict[str, Any]) -> Any:
    installation, request = override.installation, requested(override, arguments)
    laid_out: list[tuple[TextCall, Tensor | None, Balance | None]] = []
    decoder = installation.anatomy.decoder
    assert decoder is not None
    spans = decoder.spans

    def check() -> str:
        shape = _check_batch(override, arguments)
        labels = arguments.get("labels")
        targets = None if labels is None else shift(labels)
        mask, documents = arguments.get("attention_mask"), documents_of(decoder.module, arguments, shape)
        device = next(arguments[n].device for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None)
        plan = partial(plan_decoder, installation, device)
        mutual = _mutual(spans, arguments)
        call = lay_out(shape, mask, documents, targets, mutual, spans, installation.group, device, plan)
        fusion = installation.anatomy.fusion
        if fusion is not None:
            tokens = next(arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None)
            call = replace(call, needed=needed_rows(fusion, tokens, call.index, call.stream.shards))
            check_rows(installation, arguments, call.needed)
        balance = balance_of(override.module, arguments.get(ARGUMENT), request)
        call = replace(call, records_routers=balance is not None)
        laid_out.append((call, targets, balance))
        return f"{call.choice.plan} {call.stream.shards.sizes} {call.stream.host_segments} {request or ''}"

    _agree(installation, arguments, check)
    call, targets, balance = laid_out[0]
    mask = arguments.get("attention_mask")
    as_tuple = arguments.pop("return_dict", getattr(override.module.config, "return_dict", True)) is False
    labels = arguments.pop("labels", None)
    if spans is not None:  # it would make a mask (B, 1, S, S) otherwise
        arguments.pop("token_type_ids", None)
        arguments["attention_mask"] = call.mask
    arguments["use_cache"] = False
    if balance is not None:  # the decoder is asked for its routers' logits, but the model makes no loss of them
        arguments[ARGUMENT] = False
    if request is not None and targets is not None:
        return answer(override, arguments, call, labels, targets, request)
    items = arguments.pop("num_items_in_batch", None)
    local_T = None if targets is None else targets.flatten()[call.local_index]
    deferred = _head_loss(override, local_T)
    with active(call), deferred.active() if deferred else nullcontext():
        out = override.original(**arguments, return_dict=True)
    fields, config = dict(out.items()), installation.config
    if targets is not None and local_T is not None:
        count = (targets != IGNORE).sum() if items is None else items
        if deferred is None:
            logits_TV = fields["logits"].flatten(0, 1)
            whole = (count, installation.group, config.gradient)
            loss = sharded_cross_entropy(logits_TV, local_T, *whole, config.label_smoothing)
        else:
            share = deferred.take(fields.pop("logits"), check=not installation.head_verified)
            installation.head_verified = True
            loss = mean_of_shares(share, count, installation.group, config.gradient)
        fields = {"loss": loss, **fields}
    if balance is not None:
        fields |= balance.fields(fields, None if mask is None else mask.flatten()[call.local_index], installation)
    if config.gather_logits and deferred is None:
        name = "logits" if "logits" in fields else "last_hidden_state"
        fields[name] = gather_tokens(fields[name], call, installation)
    out = type(out)(**fields)
    return out.to_tuple() if as_tuple else out


def _head_loss(override: Override, targets_T: Tensor | None) -> HeadLoss | None:
    """What computes the loss inside the model's head, if the settings and this call ask for it."""
    model: Any = override.module
    config = override.installation.config
    if targets_T is None or not config.chunked_loss or not model.training:
        return None
    return HeadLoss(model.get_output_embeddings(), targets_T, logit_transform(model), config.label_smoothing)
