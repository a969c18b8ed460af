"""The measuring itself: one schema, resuming, providers that fail or are wrong, tables that follow from rows."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pandas as pd
import pytest
import torch

import triton_sp
from perf import (
    attention,
    contest,
    host,
    host_models,
    kernels,
    model,
    packs,
    plan,
    plot,
    rows,
    scale,
    single_rank,
    tables,
)
from perf.attention import Peer
from perf.cases import AttentionCase, attention_cases
from perf.clock import Clock
from perf.engines import ENGINES, OURS, QUICK, build_llm
from perf.rows import Report, Row
from triton_sp import cli
from triton_sp.forecast.hollow import Hollow

CASE = AttentionCase("test, mixed", (9, 1, 20), heads=4, kv_heads=2, dim=8, causal=True)
RATES = contest.Rates(1.0, 1.0)


@pytest.fixture
def settings(monkeypatch, tmp_path) -> contest.Settings:
    monkeypatch.setenv("TRITON_SP_RESULTS", str(tmp_path))
    return contest.Settings(torch.device("cpu"), quick=True)


def measure(settings: contest.Settings, case: AttentionCase = CASE) -> pd.DataFrame:
    report = settings.report("kernels")
    kernels.attend(case, settings, Clock(settings.device), RATES, report)
    return pd.read_csv(report.path).set_index(["provider", "direction"])


def test_rows_survive_and_are_replaced(settings) -> None:
    report = settings.report("some")
    report.add([Row("attend", "a", "x", tokens=4), Row("attend", "b", "x", tokens=4, status="error: no", dim=8)])
    again = settings.report("some")
    assert again.status(Row("attend", "b", "x", tokens=4, dim=8)) == "error: no"
    assert again.status(Row("attend", "b", "x", tokens=5, dim=8)) is None
    again.add([Row("attend", "a", "x", tokens=4, median_ms=2.0)])
    found = pd.read_csv(again.path)
    assert list(found.columns) == rows.COLUMNS and found["median_ms"].tolist()[0] == 2.0 and len(found) == 2
    assert Report(again.path, fresh=True).status(Row("attend", "a", "x", tokens=4)) is None


def test_attend_is_measured_once(settings, monkeypatch) -> None:
    found = measure(settings)
    assert set(found["status"]) == {"ok"} and (found["median_ms"] > 0).all() and (found["error_ratio"] < 1).all()
    assert found.loc[("triton_sp", "forward"), "flops"] == CASE.flops
    monkeypatch.setattr(kernels, "_contest", None)  # would raise if anything were measured again
    assert len(measure(settings)) == len(found)


def test_failing_and_wrong_peers(settings, monkeypatch) -> None:
    calls = []

    def refuse(case, table):
        calls.append(case)
        raise NotImplementedError("not\nthis shape")

    def wrong(case, table):
        right = attention._ours(case, table)
        return lambda q, k, v: right(q * 1.0, k, v) + 0.1 * (q - q.detach())  # only dq is wrong

    peers = [p for p in attention.PEERS if p.name in ("triton_sp", "SDPA")]
    peers += [Peer("refuses", refuse, lambda device: ""), Peer("cheats", wrong, lambda device: "", note="known")]
    monkeypatch.setattr(kernels, "PEERS", peers)
    found = measure(settings)
    assert found.loc[("refuses", "backward"), "status"] == "error: NotImplementedError: not this shape"
    assert found.loc[("cheats", "forward"), "status"] == "ok"
    bad = found.loc[("cheats", "backward")]
    assert bad["status"] == "wrong" and bad["note"] == "dq is wrong; known" and math.isnan(bad["ratio"])
    # The one right peer's ratio is not against what is wrong.
    assert math.isnan(found.loc[("triton_sp", "backward"), "ratio"])
    assert found.loc[("triton_sp", "forward"), "ratio"] > 0
    peers.append(replace(peers[0], name="newcomer"))
    again = measure(settings)
    assert again.loc[("newcomer", "forward"), "status"] == "ok" and len(calls) == 1  # who failed is not asked again


def test_sampled_textbook_is_the_whole_one() -> None:
    torch.manual_seed(0)
    heads = (CASE.heads, CASE.kv_heads, CASE.kv_heads, CASE.heads)
    tensors = [torch.randn(CASE.tokens, h, CASE.dim, dtype=torch.float64) for h in heads]
    sample = torch.tensor([0, 8, 9, 15, 29])
    tensors[3] = tensors[3] * torch.zeros(CASE.tokens, 1, 1, dtype=torch.float64).index_fill(0, sample, 1)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attention._ours(CASE, torch.tensor(CASE.segments.starts))(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, tensors[3])
    for found, wanted in zip(
        attention.textbook(CASE, sample, tensors, torch.float64), (out[sample], dq[sample], dk, dv), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_cases_are_as_long_as_asked() -> None:
    for case in attention_cases((4096,)):
        assert 0.7 * 4096 <= case.tokens <= 4096 and case.heads % case.kv_heads == 0, case
    assert max(max(case.lengths) for case in attention_cases((1 << 18,)) if "packed" in case.name) > 5000


def test_packs_agree_with_copies(settings) -> None:
    for case in (replace(CASE, lengths=(64,), heads=16, kv_heads=8), replace(CASE, lengths=(64,), heads=5, kv_heads=5)):
        packs.measure(case, settings, Clock(settings.device), RATES, settings.report("kernels"))
    found = pd.read_csv(settings.report("kernels").path)
    assert set(found["status"]) == {"ok"} and (found["provider"] == "torch").sum() == 2 and len(found) == 6


def test_a_model_is_compared_with_one_process(ranks, tmp_path) -> None:
    (one,) = ranks.run(model.measure, "one process", "LLaVA VLM", QUICK, 1, tmp_path / "x", ranks=1)
    found = ranks.run(model.measure, OURS, "LLaVA VLM", QUICK, 1, tmp_path / "x", ranks=2)
    for rank in found:
        assert rank["step"]["status"] == "ok", rank
        assert rank["forward"]["flops"] == one["forward"]["flops"] / 2
        assert rank["forward"]["layer_collectives"] == "4 all_to_all_single"  # of a ViT and an LLM layer
    assert set(ENGINES) >= {"one process", OURS}


class Counting(Hollow):
    """The same count of a step that is computed."""

    def _run(self, func, args, kwargs):
        return func(*args, **kwargs)


def peak_of(mode: Hollow) -> tuple[int, int]:
    with mode:
        net, batch = build_llm(QUICK)
        with single_rank.alone_among(2, 1):
            triton_sp.wrap(net, config=triton_sp.SPConfig(check="off", plan="heads"))
            loss = net(**batch).loss
            kept = mode.now
            loss.backward()
    return kept, mode.peak


def test_memory_is_counted_without_computing() -> None:
    assert peak_of(Hollow()) == pytest.approx(peak_of(Counting()), rel=0.01)


def test_one_rank_of_eight_holds_less() -> None:
    run = single_rank.Run(1, 1, 8)
    two, eight = (single_rank.account(single_rank.SMALL, run, ranks) for ranks in (2, 8))
    assert two.parameters == eight.parameters and two.inputs == eight.inputs and two.kept > eight.kept


def test_the_hosts_part_is_measured_by_stage(settings, monkeypatch) -> None:
    """Of a layer and of a whole forward, with every launch that a GPU would get, and none of its work."""
    monkeypatch.setattr(host, "RANKS", (2,))
    assert host.sweep(settings) == 0
    found = rows.read(settings.report("host").path)
    notes = found.set_index(["stage", "provider", "direction", "case"])["note"]
    layer, case = "1 attend_forward, 1 pack_heads, 1 unpack_heads", "Qwen3-VL ViT, plan heads"
    assert notes["layer", "triton_sp", "forward", case] == layer
    assert notes["model", "triton_sp", "forward", case] == layer.replace("1", str(host_models.LAYERS))
    stages = found[found["stage"].isin(["pack", "exchange", "attend", "unpack"])]
    assert len(stages[stages["case"] == case]) == 8 and (found["median_ms"] >= 0).all()
    assert tables.rotation_table(found).count("\n") == 1 + 5  # of a tower, and of decoders with norms and without
    table = tables.host_table(found)
    assert f"| {case} | 2 |" in table and "nan" not in table
    # By each of two plans, of a tower and two decoders a layer and a model; of a tower that rotates a model; and what
    # rotates is also rotated by the model.
    assert table.count("\n") == 1 + 2 * (3 + 3 + 1 + 3) and table.count("rotated by the model") == 2 * 3


def test_planning_is_measured(settings) -> None:
    assert plan.sweep(settings) == 0
    found = rows.read(settings.report("plan").path)
    assert len(found) == 2 * 2 * 6 and (found["median_ms"] > 0).all()
    assert tables.plan_table(found).count("\n") == 1 + 4 and plan.sweep(settings) == 0


def test_tables_follow_from_rows(settings) -> None:
    settings.report("scale").add(scale.rows())
    found = rows.read(settings.report("scale").path)
    text = "before\n<!-- table: scale -->\nold\n<!-- end -->\nafter\n"
    with mock.patch.dict(tables.TABLES, scale=(tables.scale_table, lambda: found)):
        new = tables.written(text)
        assert tables.written(new) == new and "old" not in new and new.endswith("<!-- end -->\nafter\n")
    assert "| LLM 28/4 heads of 128, 256k tokens | 8 | one level | 528.5 | 0.0 |" in new
    with pytest.raises(ValueError, match="nothing"):
        tables.written("<!-- table: nothing -->\n<!-- end -->")


def test_plots_are_drawn(settings, tmp_path) -> None:
    base = Row("attend", "triton_sp", "x", dim=64, tflops=1.0, median_ms=1.0)
    points = [replace(base, tokens=n, provider=p) for n in (64, 128) for p in ("triton_sp", "SDPA")]
    settings.report("kernels").add([*points, Row("rate", "torch", "product of 8 x 8", tflops=2.0)])
    plot.plot_kernels(rows.read(settings.report("kernels").path), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 5000


def test_documents_agree_with_the_csvs() -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plot", "--check"])
