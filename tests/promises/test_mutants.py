"""The parity check notices what is wrong: each mutation breaks one exact adjoint or one rule of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import parity, zoo
from torch import Tensor

from triton_sp import SPConfig, loss, stages
from triton_sp.plan.shards import Shards
from triton_sp.ranks import collectives
from triton_sp.wrappers import entry


def gather_without_gradient(x: Tensor, sizes: Any, group: Any) -> Tensor:
    """As torch.distributed.all_gather: the rank's own rows keep their graph at best."""
    whole = gather(x, sizes, group).detach()
    own = Shards(tuple(sizes)).range(group.rank)
    return torch.cat([whole[: own.start], x, whole[own.stop :]])


def backward_of_exchange_does_not_exchange(x: Tensor, send: Any, receive: Any, group: Any) -> Any:
    """In the backward, where no gradient is recorded, a rank keeps what it should have sent."""
    pending = begin_all_to_all(x, send, receive, group)
    if torch._C._current_graph_task_id() == -1:
        return pending
    kept = x.new_zeros(sum(receive), *x.shape[1:])
    rows = min(len(kept), len(x))
    kept[:rows] = x[:rows]
    return collectives.Pending(kept, pending.group)


def gather_whose_backward_only_slices(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    own = Shards(tuple(ctx.sizes)).range(ctx.group.rank)
    return grad[own.start : own.stop], None, None


def loss_of_a_local_count(fields: Any, local_T: Tensor, head: Any, count: Any, installation: Any) -> Tensor:
    local = int((local_T != loss.IGNORE).sum()) * installation.group.size
    return form_loss(fields, local_T, head, local, installation)


def labels_shifted_on_the_shard(fields: Any, local_T: Tensor, *rest: Any) -> Tensor:
    """The last token of a shard has no label then."""
    return form_loss(fields, F.pad(local_T[:-1], (0, 1), value=loss.IGNORE), *rest)


def total_with_an_all_reduce_in_its_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    dist.all_reduce(grad)
    return grad, None


gather, begin_all_to_all = collectives.gather, collectives.begin_all_to_all
form_loss = entry._loss
# name: the model that shows it, and what is replaced by what
MUTANTS: dict[str, tuple[str, Any, str, Any]] = {
    "gather": ("vit", collectives, "gather", gather_without_gradient),
    "gather_backward": ("vit", collectives._Gather, "backward", staticmethod(gather_whose_backward_only_slices)),
    "exchange": ("llama", stages, "begin_all_to_all", backward_of_exchange_does_not_exchange),
    "total": ("llama", collectives._TotalOfShares, "backward", staticmethod(total_with_an_all_reduce_in_its_backward)),
    "count": ("llama", entry, "_loss", loss_of_a_local_count),
    "shift": ("llama", entry, "_loss", labels_shifted_on_the_shard),
}
BATCH = {"vit": "many_images", "llama": "right_pad"}


def run(mutant: str | None, name: str, reference: Path) -> parity.Parity:
    case, plan = zoo.CASES[name], parity.Plan(BATCH[name], config=SPConfig(plan="heads"))
    if mutant is None:
        return parity.run(case, plan, reference)
    _, owner, attribute, broken = MUTANTS[mutant]
    with mock.patch.object(owner, attribute, broken):
        return parity.run(case, plan, reference)


@pytest.mark.parametrize("name", BATCH)
def test_without_a_mutation_the_check_passes(ranks, reference, name: str) -> None:
    for result in ranks.run(run, None, name, reference(name, BATCH[name]), ranks=2):
        result.assert_within(1e-10)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_notices(ranks, reference, mutant: str) -> None:
    name = MUTANTS[mutant][0]
    for result in ranks.run(run, mutant, name, reference(name, BATCH[name]), ranks=2):
        assert result.gradient > 1e-2, result
        with pytest.raises(AssertionError):
            result.assert_within(1e-5)
        right = result.loss < 1e-10 and result.logits < 1e-10
        assert right == (mutant not in ("count", "shift")), result
