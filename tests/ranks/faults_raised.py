"""What raises on every rank: a rank that is given something else, calls in another order, fails or ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fault import Fault, batch, culprit, fresh, layer, step, text
from kit import mishaps, tiny, zoo

import triton_sp
from triton_sp import SPConfig
from triton_sp.errors import DisagreementError, PeerError, SPError

PATIENCE = 3.0  # seconds, the timeout of the process group where a rank stops


def impatient() -> Any:
    """A group whose ranks wait for one another for a few seconds only."""
    return dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=PATIENCE))


def struck(where: str, action: Callable[[], None], group: Any = None) -> None:
    """Something happens to a rank in the middle of a step."""
    model = triton_sp.wrap(fresh(), group)
    if culprit():
        mishaps.strike(layer(model), where, action)
    step(model, batch())


def fails(where: str, error: BaseException) -> Fault:
    """A rank raises something, and lives on."""
    return Fault(lambda: struck(where, partial(mishaps.fail, error)), PeerError)


def leaves(where: str, how: Callable[[], None]) -> Fault:
    """A rank ends or stops; one that has stopped wakes after the others should have given up."""
    return Fault(lambda: struck(where, how, impatient()), PeerError)


def fewer_placeholders() -> None:
    inputs = batch("right_pad")
    inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE] = tiny.FIRST_TEXT
    step(triton_sp.wrap(fresh()), inputs)


def fails_in_plan() -> None:
    model = triton_sp.wrap(fresh())
    broken = mock.patch("triton_sp.wrappers.inputs.kept.plan_decoder", side_effect=MemoryError("no plan"))
    with broken if culprit() else mock.patch.object(time, "time", time.time):
        step(model, batch())


def other_order() -> None:
    models = [triton_sp.wrap(fresh()), triton_sp.wrap(zoo.CASES["llama"].model())]
    for model in reversed(models) if culprit() else models:
        step(model, text(20))


def forward_beside_backward() -> None:
    model = triton_sp.wrap(fresh())
    loss = model(**batch()).loss
    if culprit():
        model(**batch())
    loss.backward()


def cached_beside_sharded() -> None:
    model = triton_sp.wrap(fresh(), impatient()).eval()
    with torch.no_grad():
        model(**text(20), use_cache=culprit())


def other_config() -> None:
    step(triton_sp.wrap(fresh(), config=SPConfig(gather_logits=culprit())), batch())


def other_model() -> None:
    step(triton_sp.wrap(zoo.CASES["llama"].model() if culprit() else fresh()), text(20))


def other_batch() -> None:
    step(triton_sp.wrap(fresh()), text(20 + culprit()))


stopped = partial(mishaps.stop, 2 * PATIENCE)
FAULTS: dict[str, Fault] = {
    "no placeholders for features": Fault(fewer_placeholders, SPError, names_rank=False),
    "exception in the plan": Fault(fails_in_plan, DisagreementError),
    "exception in the forward": fails("forward", MemoryError("out of memory")),
    "exception in the backward": fails("backward", MemoryError("out of memory")),
    "killed in the forward": leaves("forward", mishaps.kill),
    "killed in the backward": leaves("backward", mishaps.kill),
    "stopped in the forward": leaves("forward", stopped),
    "stopped in the backward": leaves("backward", stopped),
    "calls in another order": Fault(other_order, DisagreementError),
    "a forward beside a backward": Fault(forward_beside_backward, SPError, names_rank=False),
    "a cached call beside a sharded one": Fault(cached_beside_sharded, PeerError),
    "another configuration": Fault(other_config, DisagreementError),
    "another model": Fault(other_model, DisagreementError),
    "another batch": Fault(other_batch, DisagreementError),
    "KeyboardInterrupt in the forward": fails("forward", KeyboardInterrupt()),
    "KeyboardInterrupt in the backward": fails("backward", KeyboardInterrupt()),
    "SystemExit in the forward": fails("forward", SystemExit()),
    "an error that is not Unicode": fails("forward", OSError("no file \udcff\udcfe")),
}
