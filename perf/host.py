"""What an attention layer costs the host: CPU time of one process, with launches and exchanges replaced by stubs.

A GPU is kept waiting where its host needs longer to launch a layer than the GPU to run it, which is where towers are
on many ranks. So the layer runs on CPU tensors of a few tokens, as on a GPU: the same Python, the same operators, and
launches that do nothing. Beside it stands SDPA on the same tensors, what the unwrapped model calls; its time is that
of computing it, on few tokens. Whole models are in host_models.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from perf import host_models
from perf.cases import AttentionCase
from perf.clock import statistics
from perf.contest import Settings
from perf.rows import Row
from perf.single_rank import alone_among
from triton_sp import stages
from triton_sp.ops import dispatch, varlen
from triton_sp.plan.segments import Segments
from triton_sp.plan.shards import Shards
from triton_sp.plan.stream import Stream
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import resolve_group

TOKENS = 16  # of a rank: few, so that what PyTorch itself computes on the CPU is no part of the time
RANKS = (1, 2, 8)
ROUNDS = 20  # layers in a measurement
WARM_UP = 2  # turns that do not count
OURS, UNWRAPPED, BOTH = "triton_sp", "SDPA, unwrapped", "forward and backward"
THEIRS = "transformers"
CASES = (
    AttentionCase("Qwen3-VL ViT", (TOKENS,), 16, 16, 72),
    AttentionCase("Qwen2.5-VL-7B LLM", (TOKENS,), 28, 4, 128, causal=True),
    AttentionCase("Qwen3-VL-8B LLM", (TOKENS,), 32, 8, 128, causal=True),
)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def _arrive(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any, name: str) -> Tensor:
    """What an all-to-all brings: nothing that was written, but where ranks compare what they have, the same of all."""
    return x if name == "agree" else x.new_empty(sum(receive), *x.shape[1:])


@contextmanager
def without_launches() -> Iterator[Counter[str]]:
    """The host's side of a GPU: every kernel is launched on a stub, and counted by its name."""
    from triton.runtime.jit import JITFunction

    from triton_sp.kernels import launch

    launched: Counter[str] = Counter()

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        launched[kernel.fn.__name__] += 1

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "target", lambda: "cuda:90"),
        mock.patch.object(dispatch, "portable", lambda device: "triton"),
        mock.patch.object(dispatch, "implementation", lambda device: "triton"),
        mock.patch.object(varlen, "check_values", lambda *_: None),  # values on a GPU are not looked at
        mock.patch.object(collectives, "_issue", _arrive),
        mock.patch.object(collectives, "_wait", lambda x, group: x),  # on a GPU the device waits
    ):
        yield launched


def stream_of(ranks: int, plan: str) -> Stream:
    """A stream of `TOKENS` tokens a rank: one segment, or, for plan "segments", one of each rank."""
    total = TOKENS * ranks
    starts = tuple(range(0, total + 1, TOKENS)) if plan == "segments" else (0, total)
    return Stream(
        resolve_group(),
        Shards((TOKENS,) * ranks),
        torch.tensor(starts, dtype=torch.int32),
        host_segments=Segments(starts),
        plan=plan,  # type: ignore[arg-type]
    )


def sharded(case: AttentionCase, ranks: int, plan: str) -> Layer:
    """The layer of one of so many ranks."""
    stream = stream_of(ranks, plan)
    return lambda q, k, v: stages.attention((q, k, v), stream, causal=case.causal)


def unwrapped(case: AttentionCase) -> Layer:
    """What a model calls without triton_sp."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
        return out[0].transpose(0, 1)

    return attend


def microseconds(layer: Layer, case: AttentionCase, backward: bool) -> float:
    """CPU time of a layer, the mean of a round."""
    heads = (case.heads, case.kv_heads, case.kv_heads)
    states = [torch.randn(TOKENS, h, case.dim, requires_grad=backward) for h in heads]
    gradient = torch.randn(TOKENS, case.heads, case.dim)

    def run() -> None:
        out = layer(*states)
        if backward:
            torch.autograd.grad(out, states, gradient)

    return timed(run)


def timed(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Microseconds of CPU time of a call, the mean of a round."""
    begin = time.process_time_ns()
    for _ in range(rounds):
        run()
    return (time.process_time_ns() - begin) / 1e3 / rounds


@dataclass(frozen=True)
class Found:
    """Milliseconds of one thing, turn by turn, and what was launched."""

    stage: str
    provider: str
    direction: str
    times: list[float]
    note: str = ""
    case: str = ""  # what the case is called besides


def measure(case: AttentionCase, ranks: int, plan: str, repeats: int) -> list[Found]:
    """The layer and its stages, ours and SDPA, in turns."""
    with alone_among(ranks, 0), without_launches() as launched:
        stream = stream_of(ranks, plan)
        layers = {OURS: sharded(case, ranks, plan), UNWRAPPED: unwrapped(case)}
        runs: dict[tuple[str, str, str], Callable[[], float]] = {
            ("layer", name, direction): lambda layer=layer, backward=backward: microseconds(layer, case, backward)
            for name, layer in layers.items()
            for direction, backward in (("forward", False), (BOTH, True))
        }
        for (stage, direction), run in stages_of(case, stream).items():
            runs[stage, OURS, direction] = lambda run=run: timed(run)
        if ranks == max(RANKS) and plan == "heads":
            runs |= before_attention(case)
        return in_turns(runs, repeats, launched)


def before_attention(case: AttentionCase) -> dict[tuple[str, str, str], Callable[[], float]]:
    """What a model's own code does to q and k, where nothing of it is left to the pack."""

    def step(states: tuple[Tensor, ...], function: Callable[..., Any]) -> None:
        found = function(*states)
        torch.autograd.grad(found, states, [torch.zeros_like(x) for x in found])

    runs: dict[tuple[str, str, str], Callable[[], float]] = {}
    for name, (states, function) in host_models.rotations(case, TOKENS).items():
        plain = [x.detach() for x in states]
        runs[name, THEIRS, "forward"] = partial(timed, partial(function, *plain))
        runs[name, THEIRS, BOTH] = partial(timed, partial(step, states, function))
    return runs


def in_turns(
    runs: dict[tuple[str, str, str], Callable[[], float]], repeats: int, launched: Counter[str], rounds: int = ROUNDS
) -> list[Found]:
    """Time each, by (stage, provider, direction), in turns: a machine that slows down does so for all."""
    taken: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
    launches: dict[tuple[str, str, str], str] = {}
    for turn in range(WARM_UP + repeats):
        for key, run in runs.items():
            launched.clear()
            spent = run() / 1e3
            launches[key] = ", ".join(f"{n // rounds} {name}" for name, n in sorted(launched.items()))
            if turn >= WARM_UP:
                taken[key].append(spent)
    return [Found(*key, times, launches[key]) for key, times in taken.items()]


def stages_of(case: AttentionCase, stream: Stream) -> dict[tuple[str, str], Callable[[], Any]]:
    """What each stage of the layer is on the host, by (stage, direction)."""
    q, k, v = (torch.randn(TOKENS, h, case.dim) for h in (case.heads, case.kv_heads, case.kv_heads))
    states = (q, k, v)
    factors = {"softmax_scale": case.dim**-0.5, "softcap": 0.0}
    if stream.is_local:
        mask = stream.mask(stream.own, stream.own, case.causal, None)
        out, lse = varlen.forward(q, k, v, mask, **factors)
        return {
            ("attend", "forward"): lambda: varlen.forward(q, k, v, mask, **factors),
            ("attend", "backward"): lambda: varlen.backward(out, None, (*states, out, lse), mask, **factors),
        }
    route = stream.route(case.heads, case.kv_heads, case.causal, None)
    group, dout = stream.group, torch.randn_like(q)

    def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return collectives.finish(collectives.begin_all_to_all(x, sent, received, group))

    def attend() -> list[tuple[Tensor, Tensor]]:
        tasks = zip(route.states(arrived), route.masks, strict=True)
        return [varlen.forward(*task, mask, **factors) for task, mask in tasks]

    def attend_backward() -> Tensor:
        buffer, places = route.places(arrived)
        for task, place, mask, own, kept in zip(
            route.states(arrived), places, route.masks, route.split(douts), attended, strict=True
        ):
            varlen.backward(own, None, (*task, *kept), mask, **factors, grads=place)
        return route.join_gradients(buffer, places)

    packed = route.pack(states)
    arrived = exchange(packed, route.sent, route.received)
    attended = attend()
    outs = route.join([out for out, _ in attended], arrived)
    results = exchange(outs, route.returned, route.results)
    douts = exchange(route.pack_gradients(dout), route.results, route.returned)
    grads = attend_backward()
    back = exchange(grads, route.received, route.sent)
    return {
        ("pack", "forward"): lambda: route.pack(states),
        ("exchange", "forward"): lambda: (
            exchange(packed, route.sent, route.received),
            exchange(outs, route.returned, route.results),
        ),
        ("attend", "forward"): lambda: route.join([out for out, _ in attend()], arrived),
        ("unpack", "forward"): lambda: route.unpack(results, q),
        ("pack", "backward"): lambda: route.pack_gradients(dout),
        ("exchange", "backward"): lambda: (
            exchange(results, route.results, route.returned),
            exchange(grads, route.received, route.sent),
        ),
        ("attend", "backward"): attend_backward,
        ("unpack", "backward"): lambda: route.unpack_gradients(back, states),
    }


def sweep(settings: Settings) -> int:
    """Measure what is not in host.csv yet; the exit code."""
    if settings.device.type != "cpu":
        print("host: it measures the host; run it with --device cpu")
        return 2
    report, repeats = settings.report("host"), 1 if settings.quick else 30
    jobs = [
        (case, partial(measure, case), ("layer", 1)) for case in CASES
    ] + [
        (model.case, partial(host_models.measure, model), ("model", host_models.LAYERS))
        for model in host_models.models(*CASES)
    ]  # fmt: skip
    each = [(*job, ranks, plan) for job in jobs for ranks in RANKS for plan in ("heads", "segments")[: min(ranks, 2)]]
    for case, find, (stage, layers), ranks, plan in tqdm(each, desc="host", disable=None):
        columns = {**case.columns(), **settings.columns(), "case": f"{case.name}, plan {plan}"}
        base = Row(stage, OURS, clock="cpu", kind="modelled", ranks=ranks, layers=layers, **columns)
        if settings.over or report.status(base) is not None:
            continue
        report.add(
            replace(
                base, stage=found.stage, provider=found.provider, direction=found.direction, note=found.note,
                case=base.case + found.case,
                layers=host_models.LAYERS if found.stage == "model" else 1, **statistics(found.times),
            )
            for found in find(ranks, plan, repeats)
        )  # fmt: skip
    print(report.path)
    return 0
