"""SPConfig(verify=n): right kernels pass it, and a wrong one, in one head on one rank, is found and named."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from kit import tiny, zoo

import triton_sp
from triton_sp import SPConfig, errors
from triton_sp.kernels.mask import Mask
from triton_sp.modules.encoder import ShardedEncoder
from triton_sp.ops import attend_cpu, exact, varlen
from triton_sp.ranks import collectives


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def scaled(out: torch.Tensor, factor: float = 1.1) -> torch.Tensor:
    """With a fault in the first head."""
    factors = torch.ones(out.shape[1], 1, dtype=out.dtype)
    factors[0] = factor
    return out * factors


RIGHT = varlen.forward, varlen.backward, varlen.attend_eagerly


def wrong_forward(*args: Any, **kwargs: Any) -> Any:
    out, lse = RIGHT[0](*args, **kwargs)
    return scaled(out), lse


def wrong_backward(*args: Any, **kwargs: Any) -> Any:
    found = RIGHT[1](*args, **kwargs)
    found.dk[:, 0] *= 1.5
    return found


FAULTS: dict[str, dict[str, Any]] = {
    "forward": {"forward": wrong_forward, "attend_eagerly": lambda *args, **kwargs: scaled(RIGHT[2](*args, **kwargs))},
    "backward": {"backward": wrong_backward},
    "none": {"forward": RIGHT[0]},
}


def model_of(case: str, dtype: torch.dtype) -> Any:
    if case == "plain":
        torch.manual_seed(0)
        blocks = (torch.nn.TransformerEncoderLayer(24, 4, 32, 0.0, batch_first=True) for _ in range(2))
        return ShardedEncoder(blocks, None, SPConfig(verify=1)).to(dtype)
    return zoo.CASES[case].build(dtype)


def steps(
    case: str, batch: str, count: int, options: dict[str, Any], fault: str, dtype: torch.dtype, reentrant: Any = None
) -> tuple[list[str], list[Any]]:
    """What `explain` tells of the verification after each step, and the errors. The fault is on the last
    rank in the last step."""
    model, told, found = model_of(case, dtype), [], []
    if case != "plain":
        triton_sp.wrap(model, config=SPConfig(trial="off", **options))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for number in range(count):
        try:
            with mock.patch.multiple(varlen, **FAULTS[fault if last() and number == count - 1 else "none"]):
                if case == "plain":
                    model(torch.arange(2 * 9 * 24, dtype=dtype).sin().view(2, 9, 24)).square().sum().backward()
                else:
                    tiny.loss_of(model(**zoo.CASES[case].batches[batch](dtype))).backward()
        except errors.VerificationError as error:
            found.append(error)
        told.append(triton_sp.explain(model).verified)
    return told, found


@pytest.mark.parametrize(
    ("case", "batch", "count", "options", "dtype", "reentrant"),
    [
        ("qwen2_5_vl", "plain", 6, {}, torch.bfloat16, None),
        ("llava", "right_pad", 6, {"plan": "heads"}, torch.float64, True),
        ("gpt_oss", "packed", 3, {"chunks": 2}, torch.float32, False),
        ("plain", "", 3, {}, torch.float32, None),
    ],
)
def test_right_kernels_pass(ranks, case, batch, count, options, dtype, reentrant) -> None:  # type: ignore[no-untyped-def]
    arguments = (case, batch, count, {"verify": 1, **options}, "none", dtype, reentrant)
    (told, found), (_, other) = ranks.run(steps, *arguments, ranks=2)
    assert not found and not other
    layers = [text.split(", ")[1].split(":")[0] for text in told]
    assert layers[0] == layers[-1] and len(set(layers)) == count - 1, told  # all, in turn
    assert all("result within" in text and "gradient" in text for text in told[-2:]), told


@pytest.mark.parametrize(
    ("case", "batch", "options", "fault", "dtype", "layer", "said"),
    [
        (
            "llava",
            "right_pad",
            {"plan": "segments"},
            "forward",
            torch.bfloat16,
            "vision_tower.encoder.layers.0",
            "in heads [0]",
        ),
        ("llama", "plain", {"plan": "heads"}, "forward", torch.bfloat16, "layers.0.self_attn", "in heads [6]"),
        ("llama", "packed", {"plan": "segments"}, "forward", torch.float32, "layers.0.self_attn", "in heads [0]"),
        ("llama_28_4", "plain", {}, "backward", torch.float64, "layers.0.self_attn", "key/value head 2"),
        ("plain", "", {}, "forward", torch.float32, "blocks.1", "heads"),  # in a second step: the first is tried out
    ],
)
def test_a_wrong_head_on_one_rank_is_named(ranks, case, batch, options, fault, dtype, layer, said) -> None:  # type: ignore[no-untyped-def]
    found = ranks.run(steps, case, batch, 1 + (case == "plain"), {"verify": 1, **options}, fault, dtype, ranks=2)
    for rank, (_, raised) in enumerate(found):
        (error,) = raised  # on every rank
        assert error.rank == rank and layer in error.field, error
        assert said in error.found and "computed by rank 1" in error.found, error
        assert str(dtype)[6:] in error.expected


def sent(verify: int) -> int:
    model: Any = triton_sp.wrap(zoo.CASES["llama"].model(), config=SPConfig(verify=verify, trial="off"))
    with collectives.record() as ledger:
        for _ in range(2):
            model(**zoo.CASES["llama"].batch("plain")).loss.backward()
    return len(ledger.entries)


def sent_with_each() -> list[int]:
    return [sent(0), sent(3), sent(2)]


def test_nothing_is_sent_between_verifications(ranks) -> None:
    off, later, now = ranks.run(sent_with_each, ranks=2)[0]
    assert off == later < now


WIDEST = {torch.float64: 1e-11, torch.float32: 1e-2, torch.float16: 0.15, torch.bfloat16: 1.0}


@pytest.mark.parametrize("dtype", WIDEST, ids=str)
@pytest.mark.parametrize("large", [1.0, 6.0])
def test_rounding_stays_within_the_bound(dtype: torch.dtype, large: float) -> None:
    """And a bound is not so wide that nothing would be found."""
    torch.manual_seed(0)
    q, k, v, dout = (
        (torch.randn(60, heads, 16) * size).to(dtype) for heads, size in ((4, large), (2, 1), (2, 1), (4, 1))
    )
    for options in ({}, {"causal": True}, {"causal": True, "window": 7}):
        for softcap, sinks in ((0.0, None), (3.0, None), (0.0, torch.randn(4))):
            mask, more = Mask(torch.tensor([0, 21, 22, 60]), **options), {"softmax_scale": 0.25, "softcap": softcap}
            out, lse = attend_cpu.attend(q, k, v, mask, **more, sinks=sinks)
            formula = exact.Formula(0.25, softcap, sinks)
            wanted = exact.attend((q, k, v), mask, formula)
            grads = attend_cpu.attend_backward(dout, None, (q, k, v, out, lse), mask, **more, sinks=sinks)
            bounded = exact.attend_backward((q, k, v), dout, mask, formula)
            for found, (value, bound) in zip((out, *grads[:3]), (wanted, *bounded), strict=True):
                assert ((found - value).abs() <= bound).all(), (options, softcap)
                assert bound.norm() < WIDEST[dtype] * value.norm(), (options, softcap)
            textbook, _ = attend_cpu.attend_exactly(*(x.double() for x in (q, k, v)), mask, **more, sinks=sinks)
            assert torch.allclose(wanted.exact.double(), textbook, rtol=1e-4, atol=1e-5)
