"""What a forward of a whole wrapped model costs the host, beside the same model as it is.

Launches and exchanges are stubs, as in host.py, and so are the products of linear layers, on both sides: what is left
is the Python and the operators that are launched. The difference is what wrapping adds: the layout of the batch, its
plan, the features of a layer (host.py) and the edges of the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
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
BY_THE_MODEL = ", rotated by the model"  # without a trial no rotation, and no norm, is left to the pack
ROUNDS = 2
Build = Callable[[AttentionCase, int, int], tuple[nn.Module, dict[str, Tensor]]]


class Model(NamedTuple):
    """A model of LAYERS layers with the heads of a case, and a batch, of so many tokens in so many segments."""

    case: AttentionCase
    build: Build
    rotates: bool = True


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


def rotating_tower(case: AttentionCase, tokens: int, images: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Qwen3-VL tower likewise."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as hub

    config = hf.Qwen3VLConfig(
        vision_config={
            "hidden_size": case.heads * case.dim, "intermediate_size": 64, "depth": LAYERS, "num_heads": case.heads,
            "patch_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [],
            "num_position_embeddings": 64,
        }
    ).vision_config  # fmt: skip
    model = hub.Qwen3VLVisionModel._from_config(config, attn_implementation="sdpa").train()
    grid = torch.tensor([[1, 4, tokens // images // 4]] * images)
    return model, {"hidden_states": torch.randn(tokens, 3 * 2 * 2 * 2), "grid_thw": grid}


def decoder(kind: str, case: AttentionCase, tokens: int, documents: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A decoder of a kind, "Llama" or "Qwen3", with the heads of the case, on documents of so many tokens together."""
    config = getattr(hf, f"{kind}Config")(
        hidden_size=4 * case.heads, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, head_dim=case.dim, vocab_size=64, use_cache=False,
    )  # fmt: skip
    model = getattr(hf, f"{kind}ForCausalLM")._from_config(config, attn_implementation="sdpa").train()
    ids = torch.randint(2, 64, (1, tokens))
    places = torch.arange(tokens // documents).repeat(documents)[None]
    return model, {"input_ids": ids, "position_ids": places}


def models(vit: AttentionCase, llm: AttentionCase, normalised: AttentionCase) -> tuple[Model, ...]:
    """With the heads of a tower, of a decoder, and of one with norms of q and k."""
    turning = replace(vit, name=f"{vit.name} with its rotation")
    return (
        Model(vit, tower, rotates=False),
        Model(turning, rotating_tower),
        Model(llm, partial(decoder, "Llama")),
        Model(normalised, partial(decoder, "Qwen3")),
    )


def measure(model: Model, ranks: int, plan: str, repeats: int) -> list[Found]:
    """A forward, and one with its backward, of the wrapped model and of the same one on one rank's part of the batch.

    Every rank is given the same number of tokens, whole segments of them where the plan is "segments". What rotates is
    wrapped twice: q and k are rotated, and normalised, where they are packed, or by its own code.
    """
    from perf import host

    options: dict[str, Any] = {"check": "off", "plan": plan, "link": "nvlink", "single": True}
    configs = {host.OURS: triton_sp.SPConfig(**options)}
    if model.rotates:
        configs[BY_THE_MODEL] = triton_sp.SPConfig(**options, trial="off")
    segments = ranks if plan == "segments" else 1
    wrapped = {name: model.build(model.case, host.TOKENS * ranks, segments) for name in configs}
    with alone_among(ranks, 0), host.without_launches() as launched, mock.patch.object(F, "linear", _Launch.apply):
        for name, (module, _) in wrapped.items():
            triton_sp.wrap(module, config=configs[name])
        runs = {
            ("model", name, direction): partial(host.timed, _run(*each, backward), ROUNDS)
            for name, each in {**wrapped, host.UNWRAPPED: model.build(model.case, host.TOKENS, 1)}.items()
            for direction, backward in (("forward", False), (host.BOTH, True))
        }
        found = host.in_turns(runs, repeats, launched, ROUNDS)
    own = [x for x in found if x.provider == BY_THE_MODEL]  # a case of its own, beside the same unwrapped model
    beside = [x for x in found if x.provider == host.UNWRAPPED and own]
    pack = [x for x in found if x.provider != BY_THE_MODEL]
    own = [replace(x, provider=host.OURS) for x in own]
    return pack + [replace(x, case=BY_THE_MODEL) for x in own + beside]


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
