"""record_step: what each rank does in a step, when, and with how much memory, as a trace, a picture and a table."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from triton_sp.errors import GroupError
from triton_sp.ops import varlen
from triton_sp.plan.route import CutHeads, WholeHeads
from triton_sp.ranks import collectives
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.install import Installation, installation_of

COLORS = {"pack": "0.35", "attend": "tab:blue", "send": "tab:orange", "wait": "tab:red", "agree": "tab:purple"}
LAYERS = (("tower", "#d9ead3"), ("decoder", "#cfe2f3"))
STAGES: tuple[tuple[Any, str, str], ...] = (  # whose function, its name, what it is called in the trace
    *((kind, name, "pack") for kind in (WholeHeads, CutHeads) for name in ("pack", "unpack")),
    *((kind, f"{name}_gradients", "pack") for kind in (WholeHeads, CutHeads) for name in ("pack", "unpack")),
    (varlen, "forward", "attend"),
    (varlen, "backward", "attend"),
    (collectives, "_issue", "send"),
    (collectives, "_wait", "wait"),
    (collectives, "_of_all", "agree"),
)


class Span(NamedTuple):
    """One piece of work of a rank: a stage, or a layer ("tower 0", "decoder 3"). Times in ms from the beginning."""

    label: str
    start: float
    stop: float


@dataclass
class Timeline:
    """What `record_step` yields. It is filled when the block ends, and prints as a table.

    Attributes:
        spans: of each rank, in the order in which they began.
        memory: of each rank, (time in ms, bytes allocated).
        sent: the bytes that each rank sent to others.
        folder: where the trace and the picture are.
    """

    folder: Path
    spans: list[list[Span]] = field(default_factory=list)
    memory: list[list[tuple[float, int]]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def total(self, rank: int, label: str) -> float:
        """The time in ms that a rank spent in a stage."""
        return sum(span.stop - span.start for span in self.spans[rank] if span.label == label)

    def __str__(self) -> str:
        lines = ["rank  " + "".join(f"{f'{stage} ms':>12}" for stage in COLORS) + f"{'sent MB':>12}{'peak MB':>12}"]
        for rank, sent in enumerate(self.sent):
            times = "".join(f"{self.total(rank, stage):12.1f}" for stage in COLORS)
            peak = max((size for _, size in self.memory[rank]), default=0)
            lines.append(f"{rank:<6}{times}{sent / 1e6:12.2f}{peak / 1e6:12.1f}")
        return "\n".join([*lines, f"{self.folder}/timeline.json opens in Perfetto and in chrome://tracing"])


@contextmanager
def record_step(model: nn.Module, folder: str | Path) -> Iterator[Timeline]:
    """Record what the ranks do in a block, usually one step, and show it. All ranks of the group enter and leave it.

    The first rank of the group writes `timeline.json`, a trace for Perfetto with every rank as a process, and, if
    matplotlib is installed, `timeline.png`. Times on a GPU are those of the GPU. Clocks of several hosts are as equal
    as the hosts keep them. Recording takes time of its own; nothing of it stays behind after the block.

    Args:
        model: a wrapped model.
        folder: where to write; it is created.

    Yields:
        A Timeline, which is filled when the block has ended without an error.

    Raises:
        GroupError: the model is not wrapped.

    >>> import torch, torch.distributed as dist, tempfile, triton_sp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = triton_sp.wrap(LlamaForCausalLM(tiny), config=triton_sp.SPConfig(single=True))
    >>> with tempfile.TemporaryDirectory() as folder, triton_sp.record_step(model, folder) as timeline:
    ...     model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    >>> sorted({span.label for span in timeline.spans[0]})
    ['agree', 'attend', 'decoder 0']
    >>> dist.destroy_process_group()
    """
    installation = installation_of(model)
    if installation is None:
        raise GroupError("model", expected="a wrapped model", found="one without a group", remedy="call wrap first")
    timeline = Timeline(Path(folder))
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    recording = profile(activities=activities, profile_memory=True)
    with collectives.record() as ledger, _labelled(installation), recording as profiler:
        yield timeline
    timeline.sent = [row[0] for row in collectives.integers_of_all([ledger.bytes], installation.group)]
    traces = _of_all_ranks(_events(profiler), installation.group)
    begin = min((event["ts"] for trace in traces for event in trace), default=0.0)
    timeline.spans = [_spans(trace, begin) for trace in traces]
    timeline.memory = [_memory(trace, begin) for trace in traces]
    if installation.group.rank == 0:
        timeline.folder.mkdir(parents=True, exist_ok=True)
        _write(traces, timeline.folder / "timeline.json")
        _draw(timeline)


# --- labels: only while recording ----------------------------------------------------------------------------------


@contextmanager
def _labelled(installation: Installation) -> Iterator[None]:
    """Put a label on every stage and every layer."""
    anatomy = installation.anatomy
    layers = [(f"tower {i}", block) for tower in anatomy.towers for i, block in enumerate(tower.blocks)]
    if anatomy.decoder is not None:
        layers += [(f"decoder {i}", block) for i, block in enumerate(anatomy.decoder.blocks)]
    with ExitStack() as stack:
        for owner, name, label in STAGES:
            original = getattr(owner, name)
            setattr(owner, name, _with_label(original, label))
            stack.callback(setattr, owner, name, original)
        for label, block in layers:
            running: list[record_function] = []
            before = block.register_forward_pre_hook(functools.partial(_begin, running, label))
            after = block.register_forward_hook(functools.partial(_end, running), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _with_label(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return run


def _begin(running: list[record_function], label: str, *_: Any) -> None:
    running.append(record_function(label))
    running[-1].__enter__()


def _end(running: list[record_function], *_: Any) -> None:
    if running:
        running.pop().__exit__(None, None, None)


# --- what was recorded ----------------------------------------------------------------------------------------------


def _events(profiler: profile) -> list[dict[str, Any]]:
    """Our labels, kernels of a GPU and what was allocated; times in microseconds on the clock of the host."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(f"{folder}/trace.json").read_text())
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    kinds = ("user_annotation", "gpu_user_annotation", "kernel")
    kept = [e for e in trace["traceEvents"] if e.get("cat") in kinds or e.get("name") == "[memory]"]
    return [{key: e[key] for key in e if key not in ("id", "bp")} | {"ts": e["ts"] + base} for e in kept]


def _of_all_ranks(events: list[dict[str, Any]], group: Group) -> list[list[dict[str, Any]]]:
    own = torch.frombuffer(bytearray(zlib.compress(json.dumps(events).encode())), dtype=torch.uint8)
    sizes = [row[0] for row in collectives.integers_of_all([len(own)], group)]
    everything: Tensor = collectives.gather(own.to(collectives.control_device(group)), sizes, group).cpu()
    return [json.loads(zlib.decompress(np.asarray(part).tobytes())) for part in everything.split(sizes)]


def _spans(trace: list[dict[str, Any]], begin: float) -> list[Span]:
    """The labels, as they ran on the GPU where there are such."""
    kinds = {event.get("cat") for event in trace}
    wanted = "gpu_user_annotation" if "gpu_user_annotation" in kinds else "user_annotation"
    found = [e for e in trace if e.get("cat") == wanted and e["name"].split()[0] in (*COLORS, "tower", "decoder")]
    starts = [(e["name"], (e["ts"] - begin) / 1e3, e["dur"] / 1e3) for e in found]
    return sorted((Span(name, start, start + length) for name, start, length in starts), key=lambda span: span.start)


def _memory(trace: list[dict[str, Any]], begin: float) -> list[tuple[float, int]]:
    """Allocated bytes of the GPU, if it is used, else of the host."""
    found = [event for event in trace if event.get("name") == "[memory]"]
    device = max((event["args"]["Device Type"] for event in found), default=0)
    used = [event for event in found if event["args"]["Device Type"] == device]
    return sorted(((e["ts"] - begin) / 1e3, e["args"]["Total Allocated"]) for e in used)


def _write(traces: list[list[dict[str, Any]]], path: Path) -> None:
    """One trace, in which every rank is a process."""
    named = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(traces))
    ]
    events = [event | {"pid": rank} for rank, trace in enumerate(traces) for event in trace]
    path.write_text(json.dumps({"traceEvents": named + events}))


# --- the picture ----------------------------------------------------------------------------------------------------


def _draw(timeline: Timeline) -> None:
    """`timeline.png`, if matplotlib is installed: a lane for each rank, and memory below."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    ranks = len(timeline.spans)
    figure = Figure(figsize=(12, 2.2 + 0.5 * ranks), layout="constrained")
    lanes, memory = figure.subplots(2, 1, sharex=True, height_ratios=[0.5 * ranks + 0.3, 1.4])
    for rank, spans in enumerate(timeline.spans):
        for kind, color, height in (*((*layer, 0.9) for layer in LAYERS), *((*stage, 0.6) for stage in COLORS.items())):
            bars = [(span.start, span.stop - span.start) for span in spans if span.label.split()[0] == kind]
            lanes.broken_barh(bars, (rank - height / 2, height), color=color, label=None if rank else kind)
        times = [time for time, _ in timeline.memory[rank]]
        sizes = [size / 1e6 for _, size in timeline.memory[rank]]
        memory.step(times, sizes, where="post", label=f"rank {rank}", linewidth=0.8)
    lanes.set(yticks=range(ranks), yticklabels=[f"rank {rank}" for rank in range(ranks)])
    lanes.invert_yaxis()
    memory.set(xlabel="ms", ylabel="MB allocated", ylim=(0, None))
    for axis in (lanes, memory):
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    figure.savefig(timeline.folder / "timeline.png", dpi=130)
