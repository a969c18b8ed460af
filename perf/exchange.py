"""One attention layer on 1, 2 and 4 CPU ranks, from q, k, v to the outputs: pack, exchange, attend, exchange, unpack.

Beside it DeepSpeed's `UlyssesSPAttentionHF` (ALST) on the same tensors, with transformers' SDPA inside. Heads are those
of real models, so that some divide by the ranks and some do not. (AutoSP's wrapper takes hidden states instead: it is
compared in model.py.)
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from perf import clock
from perf.cases import AttentionCase, K, long_tail
from perf.contest import Settings
from perf.counting import counted, listed
from perf.engines import ALST, OURS, start_deepspeed
from perf.model import CORRECT, RANKS, attempt
from perf.rows import Row
from triton_sp import Mask, stages
from triton_sp.ops import attend_cpu
from triton_sp.plan.shards import shard_tokens
from triton_sp.plan.stream import Stream
from triton_sp.ranks import groups
from triton_sp.testing import RankPool, relative_error

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # (T, H, D), (T, K, D), (T, K, D) -> (T, H, D) of this rank's tokens


def cases(settings: Settings) -> list[AttentionCase]:
    tokens = 600 if settings.quick else K
    return [
        AttentionCase("Qwen3-VL ViT, image", (tokens,), 16, 16, 72),
        AttentionCase("InternViT-6B, image", (tokens,), 25, 25, 128),
        AttentionCase("Qwen2.5-VL-7B LLM, document", (tokens,), 28, 4, 128, causal=True),
        AttentionCase("Qwen3-VL-8B LLM, document", (tokens,), 32, 8, 128, causal=True),
        AttentionCase("Qwen2.5-VL-7B LLM, packed", long_tail(tokens), 28, 4, 128, causal=True),
    ]


def ours(case: AttentionCase) -> Layer:
    group = groups.resolve_group()
    table = torch.tensor(case.segments.starts, dtype=torch.int32)
    stream = Stream(group, shard_tokens(case.tokens, group.size), table, host_segments=case.segments)
    return lambda q, k, v: stages.attention((q, k, v), stream, causal=case.causal)


def alst(case: AttentionCase) -> Layer:
    start_deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    own = shard_tokens(case.tokens, dist.get_world_size()).range(dist.get_rank())

    layer = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward, batch_size=1, num_hidden_layers=1, process_group=dist.group.WORLD,
        attn_head_count=case.heads, attn_head_size=case.dim, kv_head_count=case.kv_heads,
        local_seq_length=len(own), global_seq_length=case.tokens,
    )  # fmt: skip
    positions = torch.cat([torch.arange(n) for n in case.lengths])[None, own.start : own.stop]
    module = nn.Module()  # what transformers' attention function looks at
    module.is_causal, module.num_key_value_groups = case.causal, case.heads // case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return layer(module, q, k, v, None, position_ids=positions)[0].view(len(own), case.heads, case.dim)

    return attend


PROVIDERS = {OURS: (ours, "triton_sp"), ALST: (alst, "deepspeed")}


def measure(provider: str, case: AttentionCase, repeats: int) -> dict[str, dict[str, Any]]:
    """This rank's rows: direction -> columns. What one process finds is computed here by the reference."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    whole = [torch.randn(case.tokens, h, case.dim, generator=generator) for h in heads]
    starts = list(case.segments.starts)
    leaves = [x.clone().requires_grad_() for x in whole[:3]]
    mask = Mask(torch.tensor(starts), causal=case.causal)
    exact, _ = attend_cpu.attend_exactly(*leaves, mask, softmax_scale=case.dim**-0.5)
    grads = torch.autograd.grad(exact, leaves, whole[3])

    share = shard_tokens(case.tokens, dist.get_world_size()).range(dist.get_rank())
    own = slice(share.start, share.stop)
    q, k, v = (x[own].clone().requires_grad_() for x in whole[:3])
    layer = PROVIDERS[provider][0](case)
    with counted() as forward:
        out = layer(q, k, v)
    with counted() as backward:
        found = torch.autograd.grad(out, (q, k, v), whole[3][own])
    error = relative_error(out, exact[own].detach())
    worst = max(relative_error(ours, right[own]) for ours, right in zip(found, grads, strict=True))
    columns: dict[str, dict[str, Any]] = {}
    for direction, tally, wrong in (("forward", forward, error), ("backward", backward, worst)):
        columns[direction] = {
            "status": "ok" if wrong < CORRECT else "wrong", "error": wrong, "sent_bytes": tally.sent,
            "collectives": listed(tally.collectives), "flops": tally.flops or None,
        }  # fmt: skip
    busy = []
    for _ in range(repeats):
        dist.barrier()
        start = time.process_time()
        torch.autograd.grad(layer(q, k, v), (q, k, v), whole[3][own])
        busy.append(1e3 * (time.process_time() - start))
    right = "ok" if max(error, worst) < CORRECT else "wrong"
    return columns | {"both": {"status": right, "clock": "cpu", **clock.statistics(busy)}}


def sweep(settings: Settings) -> int:
    """Measure what is not in exchange.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("exchange: its ranks are CPU processes; run it with --device cpu")
        return 2
    report, repeats = settings.report("exchange"), 2 if settings.quick else 7
    jobs = [(ranks, case, name) for ranks in RANKS for case in cases(settings) for name in PROVIDERS]
    jobs = [job for job in jobs if job[0] > 1 or job[2] == OURS]
    pool, width = RankPool(), 0
    with tqdm(jobs, desc="exchange", disable=None) as progress:
        for ranks, case, name in progress:
            base = Row("exchange", name, ranks=ranks, **{**case.columns(), **settings.columns()})
            if importlib.util.find_spec(PROVIDERS[name][1]) is None or report.status(base) is not None or settings.over:
                continue
            if ranks != width:  # DeepSpeed leaves its groups in globals: new processes for each size
                pool.close()
                width = ranks
            found = attempt(pool, ranks, measure, name, case, repeats)
            if isinstance(found, str):
                report.add([replace(base, rank=rank, status=found) for rank in range(ranks)])
                continue
            report.add(
                replace(base, rank=rank, direction=direction, **columns)
                for rank, directions in enumerate(found)
                for direction, columns in directions.items()
            )
    pool.close()
    print(report.path)
    return 0
