"""A decoder with layers in which tokens meet in a way that cannot be cut: these get what all tokens have.

The decoder runs on this rank's tokens, as ever. A layer in which tokens meet gets those of all ranks, computes all of
it, and this rank keeps its own. The adjoint of a gather adds up what the ranks' parts say of its input, so gradients
are exact; what it costs is that every rank computes these layers. What else they are given, such as masks and biases,
is what the decoder makes of the whole batch: it is run on nothing for that, with blocks that only note it. Padding is
kept, because it is not known who sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp import stages
from triton_sp.anatomy.parts import Stack, takes_positions
from triton_sp.errors import InputError, UnsupportedModelError, require
from triton_sp.wrappers.decoders.decoder import expect_mask, install_positions, localise_text
from triton_sp.wrappers.inputs.layout import TextCall
from triton_sp.wrappers.install import Installation, LastCall, Override
from triton_sp.wrappers.plain.opaque import METHOD
from triton_sp.wrappers.plain.trial import GATHERED, tensors_in
from triton_sp.wrappers.scope import Call, active, bound_checkpoints, current, refuse_lost_scope

_RETURNS = "_triton_sp_returns"  # the attribute of a block with how many things it returns; 0 for one that is no tuple


@dataclass(frozen=True, eq=False)
class _Noting(Call):
    """While a decoder runs on nothing: by block, what it was given."""

    given: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Blocks(TextCall):
    """While the blocks run on this rank's tokens: by block, what it gets of the whole batch."""

    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    memory: frozenset[int] = frozenset()  # where that lies which the running block got


def install(stack: Stack, installation: Installation) -> None:
    """Override the decoder's forward, its blocks, and the layers in which tokens meet."""
    for block in stack.blocks:
        installation.set(block, METHOD, GATHERED)
        installation.set(block, _RETURNS, None)
        installation.override(block, _run_block)
    for layer in stack.gathered:
        installation.override(layer, _run_layer)
    install_positions(stack, installation)
    installation.override(stack.module, _run_decoder)


def _run_decoder(override: Override, *args: Any, **kwargs: Any) -> Any:
    call, installation = current(TextCall), override.installation
    if call is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    stack = installation.anatomy.decoder
    assert stack is not None
    require(
        min(call.stream.shards.sizes),
        InputError,
        "input_ids",
        "a token for each rank",
        "fewer",
        "use fewer ranks for it",
    )
    arguments = override.bind(args, kwargs)
    if call.longest is None:
        noted = dict(arguments)
        call = localise_text(arguments, call, installation)
    else:
        expect_mask(arguments.get("attention_mask"), call, stack)
        noted = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        noted |= call.whole
        if not takes_positions(stack.module):
            del noted["position_ids"]
    embeddings = arguments.get("inputs_embeds")
    width = stack.module.get_input_embeddings().embedding_dim if embeddings is None else embeddings.shape[-1]  # type: ignore[operator]
    like = next(stack.module.parameters()) if embeddings is None else embeddings
    noted |= {"input_ids": None, "inputs_embeds": like.new_zeros(*call.shape, width)}
    given = _note(override, noted)
    mask = call.whole["attention_mask"]
    if not isinstance(mask, Tensor) or tuple(mask.shape) != call.shape:
        mask = torch.ones(call.shape, dtype=torch.long, device=call.index.device)
    arguments["attention_mask"] = mask.flatten()[call.local_index][None]
    if call.records_routers:
        arguments["output_router_logits"] = True
    with (
        active(_Blocks(**{x.name: getattr(call, x.name) for x in fields(call)}, given=given)),
        bound_checkpoints(stack.module),
    ):
        out = override.original(**arguments)
    _check(out, call, stack)
    installation.last_calls[stack.name] = LastCall(call.choice, (f"{len(stack.gathered)} layers on all tokens",))
    return out


def _note(override: Override, arguments: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """By block, what it is given of the whole batch but for hidden states, which are nothing."""
    noting = _Noting()
    with active(noting), bound_checkpoints(override.module):
        override.original(**arguments)
    return noting.given


def _check(out: Any, call: TextCall, stack: Stack) -> None:
    tokens, ran = len(call.local_index), sum(call.tally[_key(block)] > 0 for block in stack.blocks)
    routers = [len(x) for x in getattr(out, "router_logits", None) or () if call.records_routers]
    if out[0].shape[:2] != (1, tokens) or ran < len(stack.blocks) or set(routers) - {tokens}:
        raise UnsupportedModelError(
            stack.name,
            expected=f"hidden states, and logits of routers, of {tokens} tokens from {len(stack.blocks)} blocks",
            found=f"{tuple(out[0].shape)}, {routers}, from {ran}",
            remedy="report this model: its blocks are not called one after another, or its experts not token by token",
        )


def _run_block(override: Override, *args: Any, **kwargs: Any) -> Any:
    """A block: hidden states are this rank's tokens, and what else runs along tokens; the rest is the whole batch's."""
    arguments = override.bind(args, kwargs)
    hidden = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    noting, scope = current(_Noting), current(_Blocks)
    if noting is not None:
        noting.given.setdefault(id(override.module), {n: x for n, x in arguments.items() if n != hidden})
        return _nothing(override, arguments, arguments[hidden])
    if scope is None:
        refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    given = scope.given[id(override.module)]
    arguments |= {name: _chosen(arguments.get(name), value, scope) for name, value in given.items()}
    noted = {id(x) for x in tensors_in(given)}
    whole = {x.untyped_storage().data_ptr() for x in tensors_in(arguments) if id(x) in noted}
    before = scope.tally["gathered"]
    # A reentrant checkpoint sees only the gradients of what comes without a name.
    unnamed = [arguments.pop(name) for name in list(override.__signature__.parameters)[: len(args)]]
    with active(replace(scope, memory=frozenset(whole))):
        out = override.original(*unnamed, **arguments)
    scope.tally[_key(override.module)] += scope.tally["gathered"] - before
    return out


def _key(block: nn.Module) -> str:
    return f"gathered by block {id(block)}"


def _nothing(override: Override, arguments: dict[str, Any], hidden: Tensor) -> Any:
    """What a block returns, with the hidden states that it was given. Of how many things that is, one run tells."""
    returns = getattr(override.module, _RETURNS)
    if returns is None:
        with torch.no_grad(), active(None):
            out = override.original(**arguments)
        returns = len(out) if isinstance(out, tuple) else 0
        for block in override.installation.anatomy.decoder.blocks:  # type: ignore[union-attr]
            if type(block) is type(override.module):
                setattr(block, _RETURNS, returns)
    return (hidden, *[None] * (returns - 1)) if returns else hidden


def _chosen(own: Any, whole: Any, call: TextCall) -> Any:
    """What a block gets: its own part of what runs along the tokens, which layers gather, else the whole batch's."""
    if isinstance(own, tuple) and isinstance(whole, tuple) and len(own) == len(whole):
        return tuple(_chosen(a, b, call) for a, b in zip(own, whole, strict=True))
    if own is None and isinstance(whole, Tensor) and whole.shape[:2] == call.shape:
        # A mask that tells nothing of this rank's tokens is None here, and gathered elsewhere (3 ranks waited forever).
        return whole.flatten(0, 1)[call.local_index][None]
    if whole is None or not isinstance(own, Tensor) or not isinstance(whole, Tensor):
        return own if whole is None else whole
    rows, length = call.shape
    along = own.shape[:2] == (1, _tokens(call)) and whole.shape[:2] in ((rows, length), (1, length))
    return own if along and own.shape[2:] == whole.shape[2:] else whole


def _run_layer(override: Override, *args: Any, **kwargs: Any) -> Any:
    """A layer on all tokens: what it is given of this rank's is gathered. It returns this rank's."""
    call = current(_Blocks)
    if call is None:
        if current(_Noting) is None:
            refuse_lost_scope(override)
        return override.original(*args, **kwargs)
    gathered = dict[int, Tensor]()

    def gather(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(map(gather, x))
        own = isinstance(x, Tensor) and x.shape[:2] == (1, _tokens(call))
        if not own or x.untyped_storage().data_ptr() in call.memory:
            return x
        if id(x) not in gathered:
            gathered[id(x)] = stages.gather(x[0], call.stream).unflatten(0, call.shape)
        return gathered[id(x)]

    with active(None):
        out = override.original(*map(gather, args), **{name: gather(value) for name, value in kwargs.items()})
    call.tally["gathered"] += 1
    states = out[0] if isinstance(out, tuple) else out
    shape = states.shape if isinstance(states, Tensor) and states.shape[:2] == call.shape else None

    def part(x: Any) -> Any:
        own = isinstance(x, Tensor) and x.shape == shape
        return x.flatten(0, 1)[call.local_index].contiguous()[None] if own else x

    return tuple(map(part, out)) if isinstance(out, tuple) else part(out)


def _tokens(call: TextCall) -> int:
    return len(call.local_index)
