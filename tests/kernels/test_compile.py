"""The attend kernels compiled without a GPU, held to the committed table (tests/data/attend_compiled.csv).

By default the cases that decide: every kernel on sm_90 at the head dims of vision towers and of language models, and
one head dim for sm_80 and gfx942. TRITON_SP_COMPILE=all compiles the whole table, as `make compile-table` writes it.
"""

import csv
import os

import pytest

pytest.importorskip("triton")

import compile_table as ct

EVERYTHING = os.environ.get("TRITON_SP_COMPILE") == "all"
CORE = [("sm_90", 72, 72), ("sm_90", 128, 128), ("sm_90", 192, 128), ("sm_80", 80, 80), ("gfx942", 72, 72)]
CASES = [(target, *dims) for target in ct.TARGETS for dims in ct.DIMS] if EVERYTHING else CORE

with open(ct.TABLE, newline="") as file:
    TABLE = {
        (row["triton"], row["target"], row["kernel"], row["tier"], int(row["dim"]), int(row["v_dim"])): row
        for row in csv.DictReader(file)
    }


@pytest.mark.parametrize(("target", "dim", "v_dim"), CASES)
def test_compiled(target, dim, v_dim, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    padded = max(sum(ct.launch.split(x)) / x for x in (dim, v_dim))  # columns that matrix instructions work on in vain
    for row in ct.rows_for([target], [(dim, v_dim)]):
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= ct.SHARED_LIMIT[target], row
        assert row["narrow_loads"] == 0 and not row["warnings"], row
        assert row["matrix"], row
        if target == "sm_90":
            assert row["mma_sync"] == 0 and row["issued_over_useful"] <= padded + 0.001, row
        known = TABLE.get((row["triton"], target, row["kernel"], row["tier"], dim, v_dim))
        if known:  # another Triton than the table's keeps the rules above, but not the very numbers
            assert row["matrix"] == known["matrix"], (row, known)
            assert row["registers"] <= int(known["registers"]) + 8, (row, known)


def test_table_has_every_kernel_and_no_spill():
    versions = {version for version, *_ in TABLE}
    assert "3.6.0" in versions and len(versions) > 1, "the oldest and the newest Triton"
    for version in versions:
        for target in ct.TARGETS:
            for dims in [(dim, dim) for dim in (64, 72, 80, 88, 96, 128, 256)]:
                kernels = {k for v, t, k, tier, *of in TABLE if (v, t, tier, *of) == (version, target, "tl", *dims)}
                assert kernels == {"forward", "dq", *(["dkv"] if max(dims) <= 128 else ["dkv_dk", "dkv_dv"])}
    assert {d for v, _, _, tier, d, _ in TABLE if (v, tier) == ("3.6.0", "gluon")} == set(ct.hopper_attend.DIMS)
    assert {(row["spill_bytes"], row["stack_bytes"], row["warnings"]) for row in TABLE.values()} == {("0", "0", "")}


def test_odd_strides_still_compile(monkeypatch):
    # Strides that are no multiple of 8 take the narrow loads that the rest must not.
    compiled = {}
    x = ct.torch.zeros(64, 3, 75, dtype=ct.torch.bfloat16)[..., :72]
    table = ct.torch.tensor([0, 64], dtype=ct.torch.int32)
    with ct.compiling_for("sm_80", compiled):
        ct.attend.forward(x, x, x, ct.Mask(table, causal=True, window=10), softmax_scale=1.0, softcap=5.0)
    assert "ld.global.b16" in compiled["forward"].asm["ptx"]


def test_tuned_launches_take_the_place_of_the_table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text('{"cuda:90 forward 72": [64, 32, {"num_warps": 4, "num_stages": 1}]}')
    monkeypatch.setenv("TRITON_SP_TUNED", str(path))
    ct.launch.tuned.cache_clear()
    with ct.compiling_for("sm_90", {}):
        tuned, other = (ct.launch.find_launch("forward", dim, dim, ct.torch.bfloat16) for dim in (72, 80))
    ct.launch.tuned.cache_clear()
    assert (tuned.rows, tuned.keys, tuned.options) == (64, 32, {"num_warps": 4, "num_stages": 1})
    assert other.rows == 128


@pytest.mark.skipif(bool(ct.gate.missing_api()), reason="this Triton's Gluon is not the one of the kernel")
def test_gluon_waits_where_it_should():
    # The scores are waited for with the product of the block before still running: one group of it, two where D is
    # split. The variant of the self-check lets nothing run.
    for wait, expected in ((False, {"0", "2"}), (True, {"0"})):
        ptx = ct.compile_gluon(80, ct.torch.float16, wait=wait)["gluon_wait" if wait else "gluon"].asm["ptx"]
        assert set(ct.re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", ptx)) == expected
        assert "mma_async.sync.aligned.m64n128k16.f32.f16.f16" in ptx
