"""Expert parallelism by transformers' own `DistributedConfig` beside sequence parallelism, on 2 x 2 ranks.

Two groups of two ranks have a batch each. Dense parameters are sharded over all four ranks by FSDP2, experts over two,
and tokens travel to their experts from each rank's part of the sequence.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kit import parity, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import triton_sp
from triton_sp.testing import relative_error


def experts() -> nn.Module:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "kv_heads": 4}
    config = tiny.text_config("Qwen3Moe", experts_implementation="eager", **options)
    return tiny.build("Qwen3MoeForCausalLM", config, "sdpa", torch.float32)


def batch(group: int) -> tiny.Batch:
    return tiny.text_batch(["left_pad", "packed"][group], torch.float32)


def step(path: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of this rank's group, and all gradients, put together from the ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(fsdp_size=4, ep_size=2, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=split, attn_implementation="sdpa", experts_implementation="eager"
    ).train()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = dist.get_rank() // 2
    triton_sp.wrap(model, groups[group], triton_sp.SPConfig(plan="heads", gradient="mean"))
    loss = model(**batch(group)).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items() if x is not None}
    return float(loss.detach()), whole


@pytest.mark.long
def test_experts_on_other_ranks(ranks, tmp_path: Path) -> None:
    model = experts()
    model.save_pretrained(tmp_path / "model")
    losses = []
    for group in range(2):
        loss = model(**batch(group)).loss
        (loss / 2).backward()
        losses.append(float(loss.detach()))
    expected = parity.gradients(model)
    for rank, (loss, found) in enumerate(ranks.run(step, str(tmp_path / "model"), ranks=4)):
        assert loss == pytest.approx(losses[rank // 2], rel=1e-6)
        assert found.keys() == expected.keys()
        wrong = {name: relative_error(found[name], grad) for name, grad in expected.items()}
        assert max(wrong.values()) < 1e-5, wrong
