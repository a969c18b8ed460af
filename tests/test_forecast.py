"""`triton-sp plan` is held to what real ranks save and send."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from kit import zoo
from promises import memory
from torch.utils._python_dispatch import _disable_current_modes

import triton_sp
from triton_sp import cli
from triton_sp.errors import InputError
from triton_sp.forecast.alike import Alike
from triton_sp.forecast.job import Job, make_batch
from triton_sp.forecast.step import Forecast, forecast
from triton_sp.ops import varlen
from triton_sp.ranks import collectives
from triton_sp.testing import saved_activations
from triton_sp.wrappers.install import installation_of

JOBS = {
    "llama": Job(gpus=2, text=301),
    "qwen2_5_vl": Job(gpus=2, text=61, images=2, height=48, width=80),
    "llava": Job(gpus=2, text=40, images=3),
    "llama, checkpointed": Job(gpus=2, text=301, checkpointing=True),
    "llama, tiled": Job(gpus=2, text=301, tiled_mlp=64),
    "llama, offloaded": Job(gpus=2, text=301, checkpointing=True, tiled_mlp=64, offload=True),
}


class Elsewhere:
    """A memory in which no tensor lives."""

    def __init__(self, pin_memory: bool) -> None:
        self.pack_hook = lambda x: x.numpy().copy()
        self.unpack_hook = lambda kept: torch.from_numpy(kept).clone()


def unseen(backward: Any) -> Any:
    """What the CPU's attention needs inside of its backward is not counted: no kernel of a GPU needs it."""

    def run(dout: Any, dlse: Any, states: Any, mask: Any, *, grads: Any = None, **factors: Any) -> Any:
        grads = grads or tuple(map(torch.empty_like, states[:3]))
        with _disable_current_modes():
            return backward(dout, dlse, states, mask, grads=grads, **factors)

    return run


def real(name: str) -> tuple[int, int, int, int, dict[str, str], int, int]:
    """Of a step: the bytes that a rank has saved and sent, in the forward and with the backward, and the most that
    lived beside weights and gradients; the plans, the rank's tokens, and the bytes that were offloaded."""
    job = JOBS[name]
    switches = {"tiled_mlp": job.tiled_mlp, "offload": job.offload}
    config = triton_sp.SPConfig(link="nvlink", check="off", trial="off", **switches)
    model: Any = zoo.CASES[name.split(",")[0]].model(torch.float32)
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = {key: x.float() if x.is_floating_point() else x for key, x in make_batch(model, job).items()}
    triton_sp.wrap(model, config=config)
    away = mock.patch("triton_sp.wrappers.layers.offload.save_on_cpu", Elsewhere)
    kernels = mock.patch.object(varlen, "backward", unseen(varlen.backward))
    with away, kernels, collectives.record() as ledger, memory.Peak() as peak:
        with saved_activations(model) as saved:
            loss = model(**batch).loss
        sent = sent_in(ledger)
        loss.backward()
    assert torch.isfinite(loss.detach())
    installation = installation_of(model)
    calls = installation.last_calls
    plans = {part: call.choice.plan for part, call in calls.items()}
    own = calls[list(calls)[-1]].choice.shards.sizes[dist.get_rank()]
    return saved[0], sent, sent_in(ledger), peak.bytes, plans, own, installation.offloaded


def sent_in(ledger: Any) -> int:
    """Without what ranks compare, which depends on `SPConfig.check`."""
    return sum(size for name, size in ledger.entries if name != "agree")


def planned(name: str, rank: int) -> Forecast:
    model = zoo.CASES[name.split(",")[0]].model(torch.float32)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    (row,) = forecast(model, JOBS[name], [2], rank=rank)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    return row


@pytest.mark.parametrize("name", JOBS)
def test_as_in_a_real_run(ranks, name: str) -> None:
    """On both ranks: plans, tokens and bytes exactly, what is saved within 5 %, and the peak within 2 %."""
    for rank, (saved, sent, sent_in_step, peak, plans, tokens, away) in enumerate(ranks.run(real, name, ranks=2)):
        row = planned(name, rank)
        assert row.offloaded == away and bool(away) == JOBS[name].offload
        assert (row.sent, row.sent_in_step, row.plans, row.own_tokens) == (sent, sent_in_step, plans, tokens)
        assert abs(row.activations / saved - 1) < 0.05
        assert abs(max(row.forward_peak, row.backward_peak) / peak - 1) < 0.02


def many_layers(name: str) -> Any:
    """Of the tower some layers attend in whole images, the others in windows."""
    text = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "num_hidden_layers": 7}
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**text))
    vision = {"depth": 8, "hidden_size": 32, "intermediate_size": 70, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2, 7]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    ids = {"image_token_id": 400, "video_token_id": 401, "vision_start_token_id": 402, "vision_end_token_id": 403}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_layers_that_are_alike(name: str) -> None:
    """Following some layers, and some chunks of logits, gives what following each of them does."""
    picture = {"images": 2, "height": 48, "width": 32} if name == "qwen2_5_vl" else {}
    other, times, tell = name == "qwen2_5_vl", list[int](), Alike._tell

    def counted(*args: Any) -> Any:  # it keeps none of them alive
        times.append(1)
        return tell(*args)

    job = Job(gpus=3, text=301, checkpointing=other, chunked_loss=other, offload=other, tiled_mlp=50, **picture)
    with torch.device("meta"):
        model = many_layers(name)
    with mock.patch("triton_sp.loss.CHUNK_ELEMENTS", 10_000):
        forecast(model, job, [3])  # what is worked out once for all
        with mock.patch.object(Alike, "_tell", counted):
            (told,) = forecast(model, job, [3])
        with mock.patch.object(Alike, "following", lambda *_: nullcontext()):
            (whole,) = forecast(model, job, [3])
    assert len(times) > 3
    for name in ("activations", "forward_peak", "backward_peak", "total"):  # but for some integers, 8 bytes a layer
        assert abs(getattr(told, name) / getattr(whole, name) - 1) < 1e-4
        told, whole = (replace(row, **{name: 0}) for row in (told, whole))
    assert told == whole and bool(told.offloaded) == other


def test_flops() -> None:
    """Of a Llama: 2 for each weight of a product and token, 4 more in the backward, and those of attention."""
    model = zoo.CASES["llama"].model(torch.float32)
    (row,) = forecast(model, JOBS["llama"], [1])
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = 2 * 14 * (301 * 302 // 2) * 96  # layers, products, pairs, channels
    assert row.flops == 6 * 301 * weights + attention
    assert row.seconds == row.flops / 400e12


def test_what_would_fit() -> None:
    model, job = zoo.CASES["llama"].model(torch.float32), Job(gpus=2, text=4000, checkpointing=True)
    (row,) = forecast(model, job, [2])
    (more,) = forecast(model, Job(gpus=2, text=row.largest(1.5 * row.total), checkpointing=True), [2])
    assert more.tokens > 1.4 * row.tokens and 0.97 < more.total / (1.5 * row.total) < 1.01


def test_explain_of_a_batch() -> None:
    case = zoo.CASES["qwen2_5_vl"]
    model = case.model(torch.float32)
    explained = triton_sp.explain(model, ranks=2, **case.batch("plain", torch.float32))
    assert "this batch, model.language_model.layers: plan heads, " in str(explained)
    assert "GB kept for the backward" in explained.needs and installation_of(model) is None
    with pytest.raises(InputError, match="ranks"):
        triton_sp.explain(model, **case.batch())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.CASES["llama"].model().config.save_pretrained(tmp_path)
    options = [str(tmp_path), "--gpus", "4", "--text", "1k", "--engine", "zero3"]
    cli.main(["plan", *options, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in rows] == [1, 2, 4] and [row["own_tokens"] for row in rows] == [1024, 512, 256]
    assert rows[2]["activations"] < 0.3 * rows[0]["activations"] and rows[0]["sent"] == 0 < rows[1]["sent"]
    cli.main(["plan", *options, "--plot", str(tmp_path / "plan.png"), "--rank", "1", "--gpu-memory", "80"])
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    capsys.readouterr()
    cli.main(["plan", *options, "--gpu-memory", "80"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("fits  largest, about") and len(lines) == 3 and all("  yes  " in line for line in lines)


def test_images_that_are_not_planned() -> None:
    with pytest.raises(InputError, match="images"):
        forecast(zoo.CASES["idefics3"].model(), Job(gpus=2, text=9, images=1, height=24, width=24), [2])
