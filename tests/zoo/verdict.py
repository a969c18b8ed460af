"""One class of transformers on ranks: exact, refused by name, or why nothing can be told."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from kit import parity
from torch import Tensor, nn
from zoo import inputs
from zoo.batches import Batch, packed_batch, text_batch
from zoo.build import build

import triton_sp
from triton_sp.errors import SPError
from triton_sp.testing import relative_error
from triton_sp.wrappers.install import installation_of

TOLERANCE = 1e-4  # in float64, but models round much to float32 themselves: norms, losses, recurrences
ROUNDED = 2e-6  # more than norms and losses round; recurrences amplify it


@dataclass(frozen=True)
class Verdict:
    """What became of a class on a number of ranks.

    Attributes:
        verdict: "exact", "refused" (by an error of ours), "wrong", "crash", "hang", or "not built": the model itself
            does not run with the configuration or the batch made here.
        error: the worst relative error of a gradient, or of the loss.
        reason: for any but "exact".
    """

    model_type: str
    name: str
    kind: str
    ranks: int
    verdict: str
    tower: str = ""
    features: str = ""
    decoder: str = ""
    error: float = float("nan")
    reason: str = ""


def judge(model_type: str, name: str, kind: str, ranks: int) -> Verdict:
    """On this rank; all ranks come to the same, but for errors that others caused."""

    def told(verdict: str, reason: Any = "", **more: Any) -> Verdict:
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        return Verdict(model_type, name, kind, ranks, verdict, reason=" ".join(text.split())[:400], **more)

    torch.set_num_threads(1)
    try:
        model = build(model_type, name, kind)
        wrapped, parts = copy.deepcopy(model), {}  # before it runs, because some models keep what they have computed
        batches = [(batch, reference(model, batch)) for batch in _batches(model, kind)]
    except Exception as error:
        return told("not built", error)
    try:
        triton_sp.wrap(wrapped, config=triton_sp.SPConfig(plan="heads"))
        parts = _parts(wrapped)
        worst, where = _worst(wrapped, batches)
        parts = _parts(wrapped)
        # An error that stays in float64 is one; but what holds only float32 is compared in it.
        if worst > ROUNDED and next(model.parameters()).dtype == torch.float64:
            with parity.widened():
                worst, where = _worst(wrapped, [(batch, _step(model, batch)) for batch, _ in batches])
    except SPError as error:
        return told("refused", error, **parts)
    except Exception as error:
        return told("crash", error, **parts)
    return told("exact" if worst <= TOLERANCE else "wrong", "" if worst <= TOLERANCE else where, error=worst, **parts)


def _worst(wrapped: nn.Module, batches: list[tuple[Batch, parity.Step]]) -> tuple[float, str]:
    """The worst error of these batches on any rank, and where it is on this one."""
    worst, where = max(_error(_step(wrapped, batch), expected) for batch, expected in batches)
    of_all = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return float(of_all), where


def _batches(model: nn.Module, kind: str) -> list[Batch]:
    """The first batch with images that the model itself takes, or padded and packed text."""
    if kind == "vision":
        return [inputs.pixel_batch(model)]
    generator = torch.Generator().manual_seed(0)
    if kind == "causal":
        packs = "position_ids" in inspect.signature(type(model).forward).parameters and not _recurrent(model)
        return [text_batch(generator), *([packed_batch(generator)] if packs else [])]
    failure: Exception = ValueError("no layout of pixels that is known here fits")
    for batch in inputs.image_batches(model):
        try:
            _step(model, batch)
        except Exception as error:
            failure = error
        else:
            text = text_batch(generator)
            types = [name for name in batch if name.endswith("token_type_ids")]
            text |= {name: torch.zeros_like(text["input_ids"]) for name in types}
            return [batch, text] if _takes(model, text) else [batch]
    raise failure


def _takes(model: nn.Module, batch: Batch) -> bool:
    """Whether a model runs on a batch by itself; some do not take text alone."""
    try:
        _step(model, batch)
    except Exception:
        return False
    return True


def _recurrent(model: nn.Module) -> bool:
    """Whether a model lets packed documents meet in recurrent layers, where there are no kernels for them."""
    kinds: Any = getattr(model.config, "layer_types", None) or ()
    return bool(set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"})


def reference(model: nn.Module, batch: Batch) -> parity.Step:
    """A step of the model itself.

    Raises:
        ValueError: it draws at random, or computes no numbers: nothing can be compared with it.
    """
    expected = _step(model, batch)
    error, where = _error(_step(model, batch), expected)
    if error > TOLERANCE:
        raise ValueError(f"the model itself does not compute {where} the same twice, by {error:.1e}")
    return expected


def _step(model: nn.Module, batch: Batch) -> parity.Step:
    """The loss of a model, or a projection of its outputs, and its gradients."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    out = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()})
    loss = out.loss if getattr(out, "loss", None) is not None else _projection(out)
    loss.backward()
    if installation_of(model) is not None:
        triton_sp.sync_gradients(model)
    return loss.detach(), parity.gradients(model)


def _projection(out: Any) -> Tensor:
    parts = [x for x in (out.last_hidden_state, getattr(out, "pooler_output", None)) if x is not None]
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator).to(x)).mean() for x in parts)  # type: ignore[return-value]


def _error(found: parity.Step, expected: parity.Step) -> tuple[float, str]:
    loss = relative_error(found[0], expected[0])
    gradient, where = parity.gradient_error(found[1], expected[1])
    worst = max((loss, "the loss"), (gradient, f"the gradient of {where}"))
    return (float("inf"), worst[1]) if worst[0] != worst[0] else worst


def _parts(model: nn.Module) -> dict[str, str]:
    """What explain says of the tower, of the features and of the decoder."""
    explanation, installation = triton_sp.explain(model), installation_of(model)
    parts = {"tower": "", "features": "", "decoder": ""}
    for row in explanation.rows:
        kind = row.kind.split(" ")[0]
        key = {"fusion": "features", "decoder": "decoder"}.get(kind, "tower")
        parts[key] = parts[key] or row.decision.removeprefix("features ")
    if installation is not None and installation.last_whole and parts["features"] == "routed":
        parts["features"] = "made whole"
    return parts
