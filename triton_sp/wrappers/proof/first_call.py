"""The first call of a model that is accepted by its structure: it is compared with the unsharded model.

Code and conventions can be read wrongly: features in another order, a module that reads hidden states between blocks,
masks or positions that a model makes in a way of its own. None of this need raise an error on a shard. So before the
first batch of each kind (with images or without, packed or padded) the model runs twice without gradients, as it is and
on shards. What differs is refused by name. Models whose loss and gradients the tests compare are not tried again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import Anatomy, Stack
from triton_sp.errors import SPError, UnsupportedModelError
from triton_sp.ranks import collectives
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.layout import TextCall
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.plain.trial import tensors_in
from triton_sp.wrappers.scope import Call, active

# Mean relative errors of tokens. Sharding changes the order of sums only: 1e-6 in float32, and up to 0.02 after some
# thirty layers in bfloat16. What is computed wrongly differs by 0.1 to 1.4.
_FINE, _COARSE = 1e-3, 0.06


def is_proven(anatomy: Anatomy) -> bool:
    """Whether nothing in a model is accepted by its structure alone; plain modules have a trial of their own."""
    fusion = anatomy.fusion
    known = fusion is None or not fusion.features or fusion.proven
    return known and all(stack.proven or stack.tried_by_blocks for stack in anatomy.stacks)


def _is_due(installation: Installation, arguments: Mapping[str, Any], *kind: bool) -> bool:
    """Whether a batch is the first of its kind; the next one is not."""
    if installation.config.trial == "off" or installation.group.size == 1 or is_proven(installation.anatomy):
        return False
    key = frozenset(name for name, value in arguments.items() if value is not None), kind
    due = key not in installation.tried
    installation.tried.add(key)
    return due


# --- a model with a decoder ----------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What came by at the decoder: the embeddings that went in, if a composite made them, and what came out."""

    embeddings: Tensor | None = None
    states: Tensor | None = None


def try_text_model(
    override: Override, arguments: dict[str, Any], inputs: dict[str, Any], batch: Batch, call: TextCall
) -> None:
    """Compare what goes into the decoder and what comes out, at this rank's tokens, with the unsharded model.

    Args:
        arguments: of the user's call.
        inputs: what the model's own forward gets on shards.

    Raises:
        UnsupportedModelError: on every rank, if they differ on any.
    """
    installation = override.installation
    decoder, fusion = installation.anatomy.decoder, installation.anatomy.fusion
    assert decoder is not None
    packed = batch.documents is not None
    if (packed and decoder.recurrent) or not _is_due(installation, arguments, packed):
        return  # without kernels for it recurrent layers let the documents of a plain run meet
    plain = {name: value for name, value in arguments.items() if name not in ("labels", "num_items_in_batch")}
    more: dict[str, Any] = {"return_dict": True, "use_cache": False}
    if "logits_to_keep" in override.__signature__.parameters:
        more["logits_to_keep"] = 1
    with _inference(installation.anatomy.entry):
        expected = _see(decoder, None, lambda: override.original(**plain | more))
        on_shards = replace(call, tally=Counter())
        found = _on_shards(installation, lambda: _see(decoder, on_shards, lambda: override.original(**inputs | more)))
    index = call.local_index
    if batch.mask is not None:  # what padding computes is nobody's
        index = index[batch.mask.flatten()[index].bool()]
    position = torch.isin(call.local_index, index)

    def error(whole: Tensor | None, own: Tensor | None) -> tuple[float, int]:
        if whole is None or own is None:
            return 0.0, 0
        same = own.shape == whole.shape and own.shape[1] != len(position)
        return _error(whole.flatten(0, 1)[index], own.flatten(0, 1)[index] if same else own[0][position])

    if fusion is not None and fusion.features:
        name = fusion.name or type(fusion.module).__name__
        _expect(installation, name, "features among the text", error(expected.embeddings, found.embeddings))
    _expect(installation, decoder.name, "hidden states", error(expected.states, found.states))


def _see(decoder: Stack, call: Call | None, run: Callable[[], Any]) -> _Seen:
    """Run a model, and keep what came by at its decoder."""
    seen = _Seen()

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        seen.embeddings = kwargs.get("inputs_embeds")
        seen.states = out[0]

    handle = decoder.module.register_forward_hook(look, with_kwargs=True)
    try:
        with active(call):
            out = run()
    finally:
        handle.remove()
    if seen.states is None:  # the decoder is the model, whose own hooks do not run in here
        seen.states = out[0]
    return seen


# --- a tower alone -------------------------------------------------------------------------------------------------


def try_vision_model(override: Override, arguments: dict[str, Any], args: Any, kwargs: Any) -> None:
    """Compare all outputs of a vision model, which are whole on every rank, with those of the unsharded model.

    Raises:
        UnsupportedModelError: on every rank, if they differ on any.
    """
    installation = override.installation
    if not _is_due(installation, arguments):
        return
    with _inference(installation.anatomy.entry):
        with active(None):
            expected = _tensors(override.original(*args, **kwargs))

        def run() -> list[Tensor]:
            with active(Call()):
                return _tensors(override.original(*args, **kwargs))

        found = _on_shards(installation, run)
    errors = [_error(a, b) for a, b in zip(expected, found, strict=False)]
    if len(expected) != len(found):
        errors.append((float("inf"), 1))
    for error in errors:
        _expect(installation, installation.anatomy.towers[0].name, "outputs", error)


def _tensors(out: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [x for x in tensors_in(out) if x.is_floating_point()]


# --- either --------------------------------------------------------------------------------------------------------


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _on_shards(installation: Installation, run: Callable[[], Any]) -> Any:
    """Run a model on shards. What runs unsharded and fails on a shard is a model that cannot be sharded."""
    try:
        return run()
    except SPError:
        raise
    except Exception as error:  # a model of anybody's
        raise UnsupportedModelError(
            type(installation.anatomy.entry).__name__,
            expected="a model that runs on this rank's part of the tokens",
            found=f"{type(error).__name__}: {error}",
            remedy="it was accepted by its structure alone and cannot be sharded: report the model",
        ) from error


def _error(expected: Tensor, found: Tensor) -> tuple[float, int]:
    """The sum of the relative errors of the tokens that differ at all, and their number."""
    if expected.shape != found.shape:
        return float("inf"), 1
    a, b = (x.detach().double().reshape(-1, x.shape[-1] if x.ndim else 1) for x in (expected, found))
    errors = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-30)
    errors = errors[(a != b).any(-1)]
    return float(errors.nan_to_num(nan=float("inf")).sum()), len(errors)


def _expect(installation: Installation, name: str, what: str, error: tuple[float, int]) -> None:
    """Raise on every rank if the tokens that differ do so by more than rounding."""
    entry = installation.anatomy.entry
    parameter = next(entry.parameters())
    total = collectives.all_reduce(
        torch.tensor(error, dtype=torch.float64, device=parameter.device), installation.group
    )
    mean = float(total[0] / total[1].clamp(min=1))
    coarse = parameter.dtype.itemsize < 4 or torch.is_autocast_enabled(parameter.device.type)
    coarse = coarse or torch.get_float32_matmul_precision() != "highest"
    if mean <= (_COARSE if coarse else _FINE):
        return
    raise UnsupportedModelError(
        name,
        expected=f"the {what} of the unsharded model",
        found=f"a mean relative error of {mean:.2g} in {int(total[1])} tokens of the first call",
        remedy="it was accepted by its structure alone and cannot be sharded: report the model",
    )
