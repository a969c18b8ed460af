"""The parity suite's jobs: a model in one process, and the same model wrapped on a rank, compared.

The reference is the unwrapped model with its own attention, run once and kept in a file that all ranks read. Its loss
is formed here from its logits, in float64 where the model runs in it: transformers' own rounds the logits to float32,
which parity at 1e-10 cannot see past; that one is compared too, at 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from kit import tiny, zoo
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import triton_sp
from triton_sp.anatomy.find import find_parts
from triton_sp.testing import RankPool, relative_error
from triton_sp.wrappers.install import installation_of
from triton_sp.wrappers.layers.rotation import ROTATOR, Rotator

transformers.logging.set_verbosity_error()
CHECKPOINTING = {"none": None, "reentrant": True, "non_reentrant": False}
ZERO = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the norm of all gradients: what may be rounding of 0
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Plan:
    """One run of a case: which batch, and how."""

    batch: str
    checkpointing: str = "none"
    config: triton_sp.SPConfig = field(default_factory=triton_sp.SPConfig)


@dataclass(frozen=True)
class Parity:
    """How far one rank was from the reference, as relative errors."""

    plan: Plan
    loss: float
    model_loss: float  # against the loss that transformers itself computes, in float32
    logits: float
    gradient: float
    worst: str  # the parameter with that gradient error
    losses: tuple[float, ...]  # of all ranks
    on_some: tuple[str, ...]  # parameters that have a gradient on some ranks and none on others

    def assert_within(self, tolerance: float) -> None:
        assert len(set(self.losses)) == 1, self
        assert self.loss <= min(tolerance, 1e-6), self
        assert self.model_loss <= 1e-6, self
        assert self.logits <= tolerance, self
        assert self.gradient <= tolerance, self
        assert not self.on_some, self


def loss_of(out: Any, labels: Tensor | None, label_smoothing: float = 0.0) -> Tensor:
    if labels is None:
        return tiny.loss_of(out)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)


Step = tuple[Tensor, dict[str, Tensor]]  # a loss, and the gradients by the names of the parameters


def step(model: nn.Module, batch: tiny.Batch, group: Any = None) -> Step:
    """A step with the loss that the model itself forms; of a wrapped model, with gradients synchronised."""
    model.zero_grad()
    loss = tiny.loss_of(model(**batch))
    loss.backward()
    if installation_of(model) is not None:
        triton_sp.sync_gradients(model, group)
    return loss.detach(), gradients(model)


def exact_step(model: nn.Module, batch: tiny.Batch, label_smoothing: float = 0.0) -> Step:
    """A step of a model in one process, with a loss in the dtype of the logits: transformers' own is in float32."""
    out = model(**{key: value for key, value in batch.items() if key != "labels"})
    loss = loss_of(out, batch["labels"], label_smoothing)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(found: Step, expected: Step, tolerance: float) -> None:
    """Within a relative error; of the loss, which models form in float32, at most 1e-6. 0 is bit for bit."""
    assert relative_error(found[0], expected[0]) <= min(tolerance, 1e-6)
    error, worst = gradient_error(found[1], expected[1])
    assert error <= tolerance, (error, worst)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def on_some_ranks(model: nn.Module) -> tuple[str, ...]:
    """The parameters that have a gradient on some ranks only: ZeRO 1 and 2 take it that there are none."""
    present = torch.tensor([p.grad is not None for p in model.parameters()], dtype=torch.int32)
    total = present.clone()
    dist.all_reduce(total)
    some = (total > 0) & (total < dist.get_world_size())
    return tuple(name for (name, _), uneven in zip(model.named_parameters(), some.tolist(), strict=True) if uneven)


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The worst relative error over parameters. A gradient that is mathematically zero is measured by the model's."""
    assert found.keys() == expected.keys()
    total = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    errors = {}
    for name, grad in expected.items():
        difference = float((found[name].double() - grad.double()).norm())
        errors[name] = difference / max(float(grad.double().norm()), ZERO[grad.dtype] * total, 1e-30)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def in_dtype_of(case: tiny.Case) -> AbstractContextManager[None]:
    """What a case is computed in: widened, where it says so."""
    return widened() if case.widened else nullcontext()


@contextmanager
def widened() -> Iterator[None]:
    """What asks for float32 gets float64."""
    torch.storage._storage_type_to_dtype_map()  # kept when first asked for: torch.load would fail for good
    wide = {"float32": torch.float64, "float": torch.float64}  # both names of it
    with mock.patch.multiple(torch, **wide), mock.patch.object(Tensor, "float", Tensor.double):
        yield


def write_reference(case: tiny.Case, batch_name: str, path: Path) -> None:
    """Loss, outputs and gradients of the unwrapped model, in this process."""
    with in_dtype_of(case):
        _write_reference(case, batch_name, path)


def _write_reference(case: tiny.Case, batch_name: str, path: Path) -> None:
    model, batch = case.model(), case.batch(batch_name)
    labels = batch.pop("labels", None)
    # Gathered layers run as the model's own do.
    alone = case.documents_alone and batch_name == "packed" and not _gathers(model)
    out = _one_by_one(model, batch) if alone else model(**batch)
    loss = loss_of(out, labels)
    loss.backward()
    with torch.no_grad():
        model_loss = loss if labels is None or alone else model(**batch, labels=labels).loss
    main = out.last_hidden_state if labels is None else out.logits
    torch.save((loss.detach(), model_loss.detach(), main.detach(), gradients(model)), path)


def _gathers(model: nn.Module) -> bool:
    """Whether layers of a model's decoder would run on the hidden states of the whole batch."""
    decoder = find_parts(model).decoder
    return decoder is not None and bool(decoder.gathered)


def _one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The outputs for packed documents, each in a call of its own."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    length = batch["input_ids"].shape[1]
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], length], strict=True)]
    outs = [model(input_ids=ids) for ids in batch["input_ids"].split(lengths, 1)]
    outs[0].logits = torch.cat([out.logits for out in outs], 1)
    return outs[0]


def set_checkpointing(model: nn.Module, kind: str) -> None:
    reentrant = CHECKPOINTING[kind]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # it cuts the graph unless an input of the checkpoint needs a gradient
            model.enable_input_require_grads()


def run(case: tiny.Case, plan: Plan, reference: Path, prepare: Callable[[nn.Module], None] | None = None) -> Parity:
    """Forward and backward of the wrapped model, on this rank."""
    with in_dtype_of(case):
        return _run(case, plan, reference, prepare)


def _run(case: tiny.Case, plan: Plan, reference: Path, prepare: Callable[[nn.Module], None] | None) -> Parity:
    model, batch = case.model(), case.batch(plan.batch)
    if prepare is not None:
        prepare(model)
    set_checkpointing(model, plan.checkpointing)
    triton_sp.wrap(model, config=plan.config)
    with known_rotations(model, plan.config):
        out = model(**batch)
    loss = loss_of(out, None)
    loss.backward()
    on_some = on_some_ranks(model)
    triton_sp.sync_gradients(model)

    decoder = installation_of(model).anatomy.decoder  # type: ignore[union-attr]
    if decoder is not None and decoder.gathered:  # its stream has the padding too
        batch.pop("attention_mask", None)
    expected_loss, model_loss, main, grads = torch.load(reference)
    gradient, worst = gradient_error(gradients(model), grads)
    losses = [torch.zeros_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, loss.detach())
    return Parity(
        plan,
        relative_error(loss, expected_loss),
        relative_error(loss, model_loss),
        output_error(out, main, batch, plan.config.gather_logits),
        gradient,
        worst,
        tuple(float(x) for x in losses),
        on_some,
    )


_tried: dict[tuple[str, ...], Rotator] = {}


@contextmanager
def known_rotations(model: nn.Module, config: triton_sp.SPConfig) -> Iterator[None]:
    """What a run has found out about the rotations of a model is known in the next run of this process: its first
    forward has the pack rotate, as the second one of a training has."""
    found = {
        (type(model).__name__, name, type(module).__name__): module.__dict__[ROTATOR]
        for name, module in model.named_modules()
        if ROTATOR in module.__dict__
    }
    for key, rotator in found.items():
        if key in _tried and config.trial != "off":
            rotator.__dict__.update(_tried[key].__dict__, since=0)
    yield
    _tried.update(found)


def weights_error(weights: Mapping[str, Tensor], reference: nn.Module, before: Mapping[str, Tensor]) -> float:
    """The worst relative difference of a weight's change in training, from the state_dict `before` on."""
    worst, found = 0.0, {key.removeprefix("module."): value for key, value in weights.items()}
    for key, value in reference.state_dict().items():
        change = value - before[key]
        full = found[key].full_tensor() if isinstance(found[key], DTensor) else found[key]
        worst = max(worst, relative_error(full - before[key], change) if float(change.norm()) > 1e-5 else 0.0)
    return worst


def output_error(out: Any, expected: Tensor, batch: dict[str, Tensor], gathered: bool) -> float:
    """Of a tower's states, or of the logits of this rank's tokens, found in the whole batch by their order."""
    if "labels" not in batch:
        return relative_error(out.last_hidden_state, expected)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if gathered:
        return relative_error(out.logits[mask], expected[mask])
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    tokens = expected.flatten(0, 1)[(mask | (targets != -100)).flatten()]
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([out.logits.shape[1]]))
    assert sum(map(int, sizes)) == len(tokens), (sizes, len(tokens))
    start = sum(map(int, sizes[: dist.get_rank()]))
    return relative_error(out.logits[0], tokens[start : start + out.logits.shape[1]])


def run_all(name: str, plans: list[Plan], references: dict[str, Path]) -> list[Parity]:
    return [run(zoo.CASES[name], plan, references[plan.batch]) for plan in plans]


def wrap(model: nn.Module, group: Any = None, **options: Any) -> nn.Module:
    """Heads exchanged, whatever the cost model thinks of models this small."""
    return triton_sp.wrap(model, group, triton_sp.SPConfig(plan="heads", **options))


def checkpointed(case: tiny.Case, batch: str, config: triton_sp.SPConfig) -> list[Plan]:
    """A batch with each kind of checkpointing that the model itself trains with. Keys that layers of Gemma 4 share
    travel in a dictionary, which a reentrant one cuts off."""
    kinds = ("non_reentrant",) if case.name.startswith("gemma4") else ("reentrant", "non_reentrant")
    return [Plan(batch, kind, config) for kind in kinds]


def heads(size: int, **options: Any) -> triton_sp.SPConfig:
    """Heads exchanged, whatever would be faster for models this small. On three ranks gradients are added, not
    averaged: the norms of most models round to float32, in which 3 g and g do not have the same digits."""
    return triton_sp.SPConfig(**{"gradient": "sum" if size == 3 else "mean", "plan": "heads"} | options)


def hold(
    ranks: RankPool,
    reference: Callable[[str, str], Path],
    name: str,
    plans: list[Plan],
    size: int,
    tolerance: float | None = None,
) -> None:
    """Each of these runs of a case is, on every rank, within the tolerance of the reference."""
    references = {plan.batch: reference(name, plan.batch) for plan in plans}
    for found in ranks.run(run_all, name, plans, references, ranks=size):
        for result in found:
            result.assert_within(tolerance or TOLERANCE[zoo.CASES[name].dtype])


def run_bitwise(name: str) -> list[str]:
    """On one rank: what differs by a bit from the model itself, over two batches."""
    case, different = zoo.CASES[name], []
    for batch_name in list(case.batches)[:2]:
        grads = []
        for wrapped in (False, True):
            model, batch = case.model(), case.batch(batch_name)
            out = (triton_sp.wrap(model) if wrapped else model)(**batch)
            loss = tiny.loss_of(out)
            loss.backward()
            grads.append({"loss": loss.detach(), **gradients(model)})
        different += [f"{batch_name} {key}" for key in grads[0] if not torch.equal(grads[0][key], grads[1][key])]
    return different
