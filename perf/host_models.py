"""What a forward of a whole wrapped model costs the host, beside the same model as it is.

Launches and exchanges are stubs, as in host.py, and so are the products of linear layers, on both sides: what is left
is the Python and the operators that are launched. The difference is what wrapping adds: the layout of the batch, its
plan, the features of a layer (host.py) and the edges of the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import triton_sp
from perf.cases import AttentionCase
from perf.single_rank import alone_among

if TYPE_CHECKING:
    from perf.host import Found

LAYERS = 4
ROTATED_BY_THE_MODEL = ", rotated by the model"  # without a trial no rotation is left to the pack
ROUNDS = 2


class _Launch(torch.autograd.Function):
    """A linear layer whose product is not computed, as where a GPU does that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        zero = x.new_zeros(())
        return zero.expand(x.shape), zero.expand(weight.shape), zero.expand(weight.shape[:1]) if ctx.biased else None


def tower(case: AttentionCase, tokens: int, images: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A SigLIP tower with the heads of the case, on images of so many tokens together."""
    side = int((tokens // images) ** 0.5)
    config = hf.SiglipVisionConfig(
        hidden_size=case.heads * case.dim, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=case.heads, image_size=2 * side, patch_size=2, vision_use_head=False,
    )  # fmt: skip
    model = hf.SiglipVisionModel._from_config(config, attn_implementation="sdpa").train()
    return model, {"pixel_values": torch.randn(images, 3, 2 * side, 2 * side)}


def decoder(case: AttentionCase, tokens: int, documents: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama with the heads of the case, on documents of so many tokens together."""
    config = hf.LlamaConfig(
        hidden_size=4 * case.heads, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, head_dim=case.dim, vocab_size=64, use_cache=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").train()
    ids = torch.randint(2, 64, (1, tokens))
    places = torch.arange(tokens // documents).repeat(documents)[None]
    return model, {"input_ids": ids, "position_ids": places}


def measure(case: AttentionCase, ranks: int, plan: str, repeats: int) -> list[Found]:
    """A forward, and one with its backward, of the wrapped model and of the same one on one rank's part of the batch.

    Every rank is given the same number of tokens, whole segments of them where the plan is "segments". A decoder is
    wrapped twice: q and k are rotated where they are packed, or by its own code.
    """
    from perf import host

    build = decoder if case.causal else tower
    options: dict[str, Any] = {"check": "off", "plan": plan, "link": "nvlink", "single": True}
    configs = {host.OURS: triton_sp.SPConfig(**options)}
    if case.causal:
        configs[ROTATED_BY_THE_MODEL] = triton_sp.SPConfig(**options, trial="off")
    wrapped = {name: build(case, host.TOKENS * ranks, ranks if plan == "segments" else 1) for name in configs}
    with alone_among(ranks, 0), host.without_launches() as launched, mock.patch.object(F, "linear", _Launch.apply):
        for name, (model, _) in wrapped.items():
            triton_sp.wrap(model, config=configs[name])
        runs = {
            ("model", name, direction): partial(host.timed, _run(*model, backward), ROUNDS)
            for name, model in {**wrapped, host.UNWRAPPED: build(case, host.TOKENS, 1)}.items()
            for direction, backward in (("forward", False), (host.BOTH, True))
        }
        found = host.in_turns(runs, repeats, launched, ROUNDS)
    own = [x for x in found if x.provider == ROTATED_BY_THE_MODEL]  # a case of its own, beside the same unwrapped model
    beside = [x for x in found if x.provider == host.UNWRAPPED and own]
    pack = [x for x in found if x.provider != ROTATED_BY_THE_MODEL]
    own = [replace(x, provider=host.OURS) for x in own]
    return pack + [replace(x, case=ROTATED_BY_THE_MODEL) for x in own + beside]


def rotations(case: AttentionCase, tokens: int) -> dict[str, tuple[tuple[Tensor, ...], Callable[..., Any]]]:
    """What transformers' models do to q and k before attention, by name: their inputs, and the function."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    cos, sin = torch.randn(2, tokens, case.dim)
    if not case.causal:
        states = tuple(torch.randn(tokens, case.heads, case.dim, requires_grad=True) for _ in range(2))
        return {"rotation": (states, lambda q, k: apply_rotary_pos_emb_vision(q, k, cos, sin))}
    norm = Qwen3RMSNorm(case.dim)
    states = tuple(torch.randn(1, n, tokens, case.dim, requires_grad=True) for n in (case.heads, case.kv_heads))
    return {
        "rotation": (states, lambda q, k: apply_rotary_pos_emb(q, k, cos[None], sin[None])),
        "norm and rotation": (states, lambda q, k: apply_rotary_pos_emb(norm(q), norm(k), cos[None], sin[None])),
    }


def _run(model: nn.Module, batch: dict[str, Tensor], backward: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = model(**batch)[0]
            if backward:
                out.backward(torch.zeros_like(out))

    return run
