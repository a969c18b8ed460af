"""Norms of q and k are found by what they have made, and left to the pack only where it computes the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from triton_sp.wrappers.install import Installation, TracedOverride
from triton_sp.wrappers.layers.norm_trial import Made, may_be_norm, try_norms
from triton_sp.wrappers.layers.rotation import _run_norm
from triton_sp.wrappers.layers.rotation_trial import version


class Attention(nn.Module):
    """What normalises q and k, and hands them on."""

    def __init__(self, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.q_norm, self.k_norm = q_norm, k_norm
        for norm in self.children():
            norm.forward = TracedOverride(norm, _run_norm, mock.Mock(spec=Installation), "forward").__call__

    def tried(self, after: Any = None, dim: int = 8, dtype: torch.dtype = torch.double) -> tuple[Any, str]:
        """The result of a trial of its norms, in whose layout heads and tokens change places."""
        given = [torch.randn(1, 7, heads, 8, dtype=dtype) for heads in (4, 2)]
        made = [norm(x) for norm, x in zip(self.children(), given, strict=True)]
        calls = [Made(*found, version(found[2])) for found in zip(self.children(), given, made, strict=True)]
        rotated = [x.transpose(1, 2) for x in made]
        return try_norms(self, calls, rotated if after is None else [after(x) for x in rotated], dim)


class Misnamed(nn.RMSNorm):
    """Its eps is another than the one that it has."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight, 2 * (self.eps or 0.0))


def rms(eps: float | None = 1e-5, kind: type[nn.RMSNorm] = nn.RMSNorm) -> nn.Module:
    return kind(8, eps=eps, dtype=torch.double)


def test_trial_of_norms() -> None:
    """Both forms of the weight are found, and what differs in any way is left to the model's own code."""
    found, why = Attention(rms(), rms()).tried()
    assert (found.names, found.eps, found.offset, why) == (("q_norm", "k_norm"), 1e-5, 0.0, "")
    for kind, offset in ((Qwen3RMSNorm, 0.0), (Gemma3RMSNorm, 1.0)):
        assert Attention(kind(8), kind(8)).tried(dtype=torch.float32)[0].offset == offset
        assert "precision" in Attention(kind(8), kind(8)).tried()[1], "it rounds to float32"
    assert "another way" in Attention(*(nn.LayerNorm(8, bias=False).double() for _ in range(2))).tried()[1]
    assert "another way" in Attention(rms(kind=Misnamed), rms(kind=Misnamed)).tried()[1]
    assert Attention(rms(), rms(1e-6)).tried()[1] == "not of one kind"
    assert Attention(rms(None), rms(None)).tried()[1] == "RMSNorm has no one eps"
    assert Attention(rms(), rms()).tried(lambda x: x * 1.0) == (None, ""), "nothing is known to be normalised"
    assert "alike" in Attention(rms(), rms()).tried(lambda x: x.clone() if x.shape[1] == 2 else x)[1]
    assert "changed" in Attention(rms(), rms()).tried(lambda x: x.mul_(2.0))[1]
    assert "another dim" in Attention(rms(), rms()).tried(dim=6)[1]
    assert may_be_norm(rms()) and not may_be_norm(nn.Linear(8, 8, bias=False)) and not may_be_norm(nn.BatchNorm1d(8))


class Sharded(nn.Parameter):
    """As a DTensor: a tensor whose numbers are not all here."""


def test_norms_that_something_else_has_changed() -> None:
    """They are left to the pack in calls in which nothing would see that."""
    for change in (
        lambda module: module.q_norm.register_forward_hook(lambda *_: None),
        lambda module: module.k_norm.register_full_backward_pre_hook(lambda *_: None),
        lambda module: setattr(module, "k_norm", nn.Sequential(module.k_norm)),
        lambda module: setattr(module.k_norm, "forward", module.k_norm.forward.__self__.original),
        lambda module: setattr(module.q_norm, "weight", Sharded(module.q_norm.weight.detach())),
    ):
        module = Attention(rms(), rms())
        found, _ = module.tried()
        assert found.of(module) == (module.q_norm, module.k_norm)
        change(module)
        assert found.of(module) == ()
    module = Attention(rms(), rms())
    found, _ = module.tried()
    with mock.patch.object(nn.RMSNorm, "forward", lambda self, x: x):
        assert found.of(module) == ()
    assert found.of(module) != ()
