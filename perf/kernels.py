"""Speed of the stages that one GPU does alone: attend, pack and unpack, beside who else does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from perf import packs
from perf.attention import PEERS, Peer, error_ratio, sampled_rows, textbook
from perf.cases import SIZES, AttentionCase, K, attention_cases, headline_cases
from perf.clock import Clock, peak_memory
from perf.contest import LOST, Entry, Rates, Settings, failure, lost, measure_rates, ranked, timed
from perf.published import published
from perf.rows import Report, Row

# By the rule that FlashAttention's tests set: twice the textbook's error for outputs, three times for gradients.
ALLOWED = {"forward": 2.0, "backward": 3.0}
ALONE = 1 << 31  # bytes of q, k, v and out
Contest = Callable[[Settings, Clock, Rates, Report], None]


class GpuLost(Exception):
    """This process can use the GPU no more; the argument is the rows of the case so far."""


def cases(settings: Settings) -> list[AttentionCase]:
    """What fits the device: a CPU does the mechanics, on sizes whose times mean little."""
    if settings.device.type == "cpu":
        small = attention_cases((256,) if settings.quick else (K,))
        return [case for case in small if not settings.quick or case.tokens <= 256]
    return attention_cases((4 * K,) if settings.quick else SIZES)


def row_of(case: AttentionCase, peer: Peer, direction: str, settings: Settings) -> Row:
    columns: dict[str, Any] = {**case.columns(), **settings.columns()}
    flops = case.flops * (2.5 if direction == "backward" else 1.0)
    return Row("attend", peer.name, direction=direction, flops=flops, note=peer.note, **columns)


def attend(case: AttentionCase, settings: Settings, clock: Clock, rates: Rates, report: Report) -> None:
    """All peers on one case. Who has failed on it before is left out, so that a crash is not repeated."""
    usable = [p for p in PEERS if not p.absent(settings.device) and (settings.slow or not p.slow_to_start)]
    rows = {(p, d): row_of(case, p, d, settings) for p in usable if p.fits(case) for d in p.directions}
    known = {key: report.status(row) for key, row in rows.items()}
    if all(known.values()):
        return
    rows = {key: row for key, row in rows.items() if not (known[key] or "").startswith("error")}
    try:
        report.add(_contest(case, rows, settings, clock, rates))
    except torch.OutOfMemoryError as error:
        report.add(replace(row, status=failure(error)) for row in rows.values())


def _contest(
    case: AttentionCase, rows: dict[tuple[Peer, str], Row], settings: Settings, clock: Clock, rates: Rates
) -> list[Row]:
    """Every peer is checked, then they are timed in turns; one by one where their graphs would fill the memory."""
    torch.manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    tensors = [torch.randn(case.tokens, h, case.dim, device=settings.device, dtype=settings.dtype) for h in heads]
    table = torch.tensor(case.segments.starts, device=settings.device, dtype=torch.int32)
    sample = sampled_rows(case)
    wide = torch.float64 if settings.dtype == torch.float32 else torch.float32
    exact, plain = (textbook(case, sample, tensors, dtype) for dtype in (wide, settings.dtype))
    alone = case.numbers * settings.dtype.itemsize > ALONE
    waiting, done = list[Entry](), list[Row]()
    for peer in dict.fromkeys(peer for peer, _ in rows):
        own = {direction: row for (other, direction), row in rows.items() if other is peer}
        try:
            waiting += _prepare(peer, own, case, table, tensors, exact, plain)
            if alone:
                done += timed(waiting, clock, rates, settings)
                waiting.clear()
        except Exception as error:  # a peer may refuse a case in any way it likes
            done += [replace(row, status=failure(error)) for row in own.values()]
            if lost(error):
                raise GpuLost(done) from error
    return ranked(done + timed(waiting, clock, rates, settings))


def _prepare(
    peer: Peer,
    rows: dict[str, Row],
    case: AttentionCase,
    table: Tensor,
    tensors: list[Tensor],
    exact: list[Tensor],
    plain: list[Tensor],
) -> list[Entry]:
    """Check a peer against the textbook, and make ready what is timed of it."""
    q, k, v, dout = tensors
    function, sample = peer.prepare(case, table), sampled_rows(case).to(q.device)
    moved = case.numbers * q.element_size()

    def forward() -> None:
        with peer.around(), torch.no_grad():
            function(q, k, v)

    with peer.around(), torch.no_grad(), peak_memory(q.device) as memory:
        found = function(q, k, v)
    ratios = {"out": error_ratio(found[sample], exact[0], plain[0])}
    entries = [Entry(_judged(rows["forward"], ratios, memory), forward, moved)]
    if "backward" not in rows:
        return entries

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    sparse = torch.zeros_like(dout)
    sparse[sample] = dout[sample]
    with peer.around():
        out = function(*leaves)
        with peak_memory(q.device) as memory:
            dq, dk, dv = torch.autograd.grad(out, leaves, sparse, retain_graph=True)

    def backward() -> None:
        with peer.around():
            torch.autograd.grad(out, leaves, dout, retain_graph=True)

    triples = zip(("dq", "dk", "dv"), (dq[sample], dk, dv), exact[1:], plain[1:], strict=True)
    ratios = {name: error_ratio(*part) for name, *part in triples}
    return [*entries, Entry(_judged(rows["backward"], ratios, memory), backward, 2 * moved)]


def _judged(row: Row, ratios: dict[str, float], memory: list[int]) -> Row:
    """The row with its errors: wrong, if one tensor is."""
    worst = max(ratios, key=ratios.__getitem__)
    row = replace(row, error_ratio=ratios[worst], memory_bytes=memory[0] if memory else None)
    if ratios[worst] <= ALLOWED[row.direction]:
        return row
    return replace(row, status="wrong", note=f"{worst} is wrong" + (f"; {row.note}" if row.note else ""))


def contests(settings: Settings) -> Iterator[tuple[str, Contest]]:
    """Everything to measure, the most telling first: the headline cases, the movements, then all cases of all sizes."""
    size = SIZES[0] if settings.device.type == "cuda" and not settings.quick else 256
    parts: dict[str, Callable[[], list[AttentionCase]]] = {
        "headline": lambda: headline_cases(size), "packs": list, "rest": lambda: cases(settings),
    }  # fmt: skip
    for part, of_part in parts.items():
        if settings.part in ("", part):
            for case in of_part():
                yield f"{case.name}, {case.tokens}", lambda *args, case=case: attend(case, *args)
            if part == "packs":
                yield from packs.contests(settings)


def sweep(settings: Settings) -> int:
    """Measure what is not in kernels.csv yet; the exit code."""
    report, clock = settings.report("kernels"), Clock(settings.device)
    rates, rows = measure_rates(clock, settings)
    report.add([*rows, *published()])
    todo = list(contests(settings))
    with tqdm(todo, desc="kernels", disable=None) as progress:
        for name, contest in progress:
            if settings.over:
                print(f"out of time before {name}")
                break
            progress.set_postfix_str(name)
            try:
                contest(settings, clock, rates, report)
            except GpuLost as error:
                report.add(row for row in error.args[0] if row.status.startswith("error"))
                print(f"the GPU is lost: {error.__cause__}")
                return LOST
            except Exception as error:  # outside of what is any one peer's
                report.add([Row("attend", "every provider", name, status=failure(error), **settings.columns())])
                if lost(error):
                    return LOST
    print(f"{report.path}")
    return 0
