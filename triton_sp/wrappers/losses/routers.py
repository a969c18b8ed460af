"""The auxiliary loss that balances the experts of a mixture (arXiv:2101.03961), over the tokens of all ranks.

It is the product of two means over all tokens, of how often each expert is chosen and of how probable it is, so that
that of a shard is not a share of it. The sums behind the means are: each rank makes those of its tokens, and they are
added up. The model's own code is kept from making the loss of its shard, and only asked for its routers' logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_sp.errors import InputError, UnsupportedModelError
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.install import Installation
from triton_sp.wrappers.losses.scores import ScoreRequest

ARGUMENT = "output_router_logits"


@dataclass(frozen=True)
class Balance:
    """How a model balances its experts.

    Attributes:
        top_k: experts that a token is sent to.
        coefficient: what the auxiliary loss is multiplied by before it is added to the loss.
        own: the model's own function, by which ours is checked.
    """

    top_k: int
    coefficient: float
    own: Callable[..., Any]

    def fields(self, out: dict[str, Any], keep_T: Tensor | None, installation: Installation) -> dict[str, Any]:
        """The fields of the output that depend on it: the auxiliary loss of the whole batch, and the loss with it.

        Args:
            out: what it has returned of this rank's tokens.
            keep_T: see `loss`.
        """
        logits = out.get("router_logits")
        if not logits:
            raise UnsupportedModelError(
                ARGUMENT,
                expected="a model that returns the logits of its routers",
                found="none in its outputs",
                remedy=f"set {ARGUMENT}=False in the model's configuration and in the call",
            )
        group, gradient = installation.group, installation.config.gradient
        auxiliary = self.loss(logits, keep_T, group, gradient, check=not installation.routers_verified)
        installation.routers_verified = True
        if out.get("loss") is None:
            return {"aux_loss": auxiliary}
        return {"loss": out["loss"] + self.coefficient * auxiliary, "aux_loss": auxiliary}

    def loss(
        self, logits: tuple[Tensor, ...], keep_T: Tensor | None, group: Group, gradient: str, check: bool
    ) -> Tensor:
        """The auxiliary loss of the batch, equal on every rank.

        Args:
            logits: (T, experts) of this rank's tokens, of each layer.
            keep_T: which of them count, 0 or 1; None for all.
            gradient: as for `loss.mean_of_shares`.
            check: whether to compare with the model's own function, on this rank's tokens.

        Raises:
            UnsupportedModelError: the model's own function is another.
        """
        if check and len(logits[0]):
            self._compare(logits)
        chosen, probable, rows = self._sums(logits, keep_T)
        probable = collectives.scale_gradient(probable, group.size if gradient == "mean" else 1.0)
        total = collectives.all_reduce(torch.cat([chosen, rows[None]]), group)
        return _product(total[:-1], collectives.total_of_shares(probable, group), total[-1])

    def _sums(self, logits: tuple[Tensor, ...], keep_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Over layers and tokens: how often each expert is chosen, its probabilities, and how many tokens count."""
        experts, device = logits[0].shape[-1], logits[0].device
        keep = torch.ones(len(logits[0]), device=device) if keep_T is None else keep_T.to(device, torch.float32)
        chosen, probable = torch.zeros(experts, device=device), torch.zeros(experts, device=device)
        for layer in logits:
            weights = layer.to(device).softmax(-1)
            best = weights.topk(self.top_k, dim=-1).indices
            chosen = chosen.scatter_add(0, best.flatten(), keep.repeat_interleave(self.top_k))
            probable = probable + (weights.float() * keep[:, None]).sum(0)
        return chosen, probable, keep.sum() * len(logits)

    def _compare(self, logits: tuple[Tensor, ...]) -> None:
        logits = tuple(layer.detach() for layer in logits)
        ours = _product(*self._sums(logits, None))
        try:
            theirs = torch.as_tensor(self.own(logits, logits[0].shape[-1], self.top_k)).to(ours)
            found = f"{float(theirs):.6g}"
        except Exception as error:  # a function of the model's, which may have other arguments
            theirs, found = torch.full_like(ours, torch.nan), f"{type(error).__name__}: {error}"
        if not torch.allclose(ours, theirs, rtol=1e-3):
            raise UnsupportedModelError(
                ARGUMENT,
                expected=f"an auxiliary loss of {float(ours):.6g} on these tokens, the number of experts times the sum "
                "over them of how often each is chosen times how probable it is",
                found=f"{found} from {self.own.__module__}.{self.own.__name__}",
                remedy=f"set {ARGUMENT}=False in the model's configuration",
            )


def _product(chosen: Tensor, probable: Tensor, rows: Tensor) -> Tensor:
    return ((chosen / rows) * (probable / rows)).sum() * len(chosen)


def balance_of(entry: nn.Module, given: Any, request: ScoreRequest | None) -> Balance | None:
    """How this call balances experts; None if it does not, as where it is asked for scores and not for a loss.

    Args:
        given: `output_router_logits` of the call, by which the configuration is overruled.

    Raises:
        InputError: it does, in a way that is not known.
    """
    model: Any = entry
    config = model.config.get_text_config()
    if not (getattr(config, ARGUMENT, False) if given is None else given):
        return None
    if ARGUMENT not in inspect.signature(type(entry).forward).parameters:
        return None  # a model without a loss of its own returns what it is asked for
    if request is not None and not request.by_trainer:
        return None
    places = (entry, config)
    top_k = _first(places, "num_experts_per_tok", "moe_k", "top_k")
    coefficient = _first(places, "router_aux_loss_coef", "aux_loss_coef")
    modules = [sys.modules.get(cls.__module__) for cls in type(entry).__mro__]
    own = next((f for m in modules if (f := getattr(m, "load_balancing_loss_func", None)) is not None), None)
    if request is not None:
        raise InputError(
            ARGUMENT,
            expected="False with a trainer's fused head, whose loss does not contain it",
            found="True",
            remedy="leave the fused head out, or the auxiliary loss",
        )
    if top_k is None or coefficient is None or own is None:
        raise InputError(
            ARGUMENT,
            expected="a model whose auxiliary loss is load_balancing_loss_func of its routers' logits",
            found=f"{type(entry).__name__}, which has {'another' if own is None else 'experts by other names'}",
            remedy=f"set {ARGUMENT}=False in the model's configuration and in the call",
        )
    return Balance(int(top_k), float(coefficient), own)


def _first(places: tuple[Any, ...], *names: str) -> Any:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if value is not None), None)
