"""The attend kernels compiled without a GPU, held to the committed table (tests/data/attend_compiled.csv).

By default the cases that decide: every kernel on sm_90 at the head dims of vision towers and of language models.
TRITON_SP_COMPILE=all compiles the whole table, as `make compile-table` writes it.
"""

import os
import re

import pytest

pytest.importorskip("triton")

import compile_table as ct
from compiling import SHARED_LIMIT, TARGETS, compiling_for
from moves_table import TABLE as MOVES

EVERYTHING = os.environ.get("TRITON_SP_COMPILE") == "all"
CORE = [("sm_90", ct.Case(72, 72)), ("sm_90", ct.Case(128, 128))]
CASES = [(target, case) for target in TARGETS for case in ct.CASES] if EVERYTHING else CORE
TABLE = ct.TABLE.read()


def assert_good(row):
    """No spill, but for 8 registers a thread on sm_100, whose own matrix unit the kernels don't fit yet; no product in
    vain on the chip that they are for; no load narrower than a tile makes it."""
    row = {name: str(value) for name, value in row.items()}
    assert int(row["shared_bytes"]) <= SHARED_LIMIT[row["target"]] and not row["warnings"] and row["matrix"], row
    parts = [ct.launch.split(int(row[name])) for name in ("dim", "v_dim")]
    assert int(row["spill_bytes"]) <= (32 if row["target"] == "sm_100" else 0), row
    if row["target"] == "sm_90":
        assert row["mma_sync"] == row["stack_bytes"] == "0", row
        padded = max(sum(part) / int(row[name]) for part, name in zip(parts, ("dim", "v_dim"), strict=True))
        assert float(row["issued_over_useful"]) <= padded + 0.001, row
    if row["tier"] == "tl" and row["target"].startswith("sm"):
        # A part 16 columns wide of 64 rows leaves 8 bytes to each of 256 threads. The statistics of rows are 4 bytes.
        tile, threads = int(row["rows" if row["kernel"].startswith("dkv") else "keys"]), 32 * int(row["warps"])
        least = min([16, *(tile * size * 2 // threads for part in parts for size in part if size)])
        widths = {int(width) for width in re.findall(r"\*(\d+)", row["loads"])}
        statistics = {4} if row["kernel"].startswith("dkv") else set()
        assert widths <= {width for width in (16, 8, 4) if width >= least} | statistics, row


@pytest.mark.parametrize(("target", "case"), CASES)
def test_compiled(target, case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    for row in ct.rows_for(target, case):
        assert_good(row)
        known = TABLE.get(ct.TABLE.key(row))
        if known:  # another Triton than the table's keeps the rules above, but not the very numbers
            assert row["matrix"] == known["matrix"], (row, known)
            assert row["registers"] <= int(known["registers"]) + 8, (row, known)


def test_table_is_whole_and_good():
    """Every case on every target, for the oldest and the newest Triton, and no row that is bad."""
    versions = {version for version, *_ in TABLE}
    assert "3.6.0" in versions and len(versions) > 1, "the oldest and the newest Triton"
    newest = max(versions, key=lambda version: tuple(map(int, version.split("."))))
    for version, target in ((version, target) for version in ("3.6.0", newest) for target in TARGETS):
        found = {key[3:8] for key in TABLE if key[:3] == (version, target, "tl")}
        for case in ct.CASES:
            split = max(case.dim, case.v_dim) > 128
            dkv = () if case.variant == "sinks" else ("dkv_dk", "dkv_dv") if split else ("dkv",)
            assert {(*case.key, kernel) for kernel in ("forward", "dq", *dkv)} <= found, (version, target, case)
    assert {key[3] for key in TABLE if (key[0], key[2]) == ("3.6.0", "gluon")} == set(map(str, ct.hopper_attend.DIMS))
    for row in TABLE.values():
        assert_good(row)


def test_moves_are_whole():
    """pack, unpack and splice: no spill, a place for each number where heads divide, and 16 bytes at a time. Else
    narrower are a box's numbers, one after another, and the rows of splice's index. Normalised heads have a power of
    two of places."""
    rows = MOVES.read()
    assert {(row["triton"][:3], row["target"], row["kernel"]) for row in rows.values()} >= {
        (version, target, kernel) for version in ("3.6", "3.9") for target in ("sm_80", "sm_90", "gfx942")
        for kernel in ("pack_heads", "unpack_heads", "pack_boxes", "unpack_boxes", "splice_rows",
                       "pack_heads_rotated", "unpack_heads_rotated", "pack_heads_normalised", "unpack_heads_normalised")
    }  # fmt: skip
    for row in rows.values():
        assert row["spill_bytes"] == row["stack_bytes"] == "0", row
        loads, stores = (set(re.findall(r"\*(\d+)", part)) for part in row["accesses"].split(","))
        whole = "16"
        normalised = row["kernel"].endswith("normalised")
        if normalised or row["kernel"].endswith("rotated"):
            # Half of a head of 72 is 36 numbers, 4 at a time; and AMD's warps have 64 threads for a tile of as many.
            whole = str((8 if row["dim"] == "72" else 16) // (1 + (row["target"] == "gfx942")))
        sums = {"4"} if row["kernel"] == "unpack_heads_normalised" else set()  # of the weights' gradients, a tile's few
        assert whole in loads and stores == {whole} | sums, row
        assert float(row["lanes"] or 1) <= (128 / int(row["dim"]) if normalised else 1) + 0.001, row
        if "heads" in row["kernel"]:
            assert loads == {whole}, row


def test_odd_strides_still_compile(monkeypatch):
    # Strides that are no multiple of 8 take the narrow loads that the rest must not.
    compiled = {}
    x = ct.torch.zeros(64, 3, 75, dtype=ct.torch.bfloat16)[..., :72]
    table = ct.torch.tensor([0, 64], dtype=ct.torch.int32)
    with compiling_for("sm_80", compiled):
        ct.attend.forward(x, x, x, ct.Mask(table, causal=True, window=10), softmax_scale=1.0, softcap=5.0)
    assert "ld.global.b16" in compiled["forward"].asm["ptx"]


def test_tuned_launches_take_the_place_of_the_table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text('{"cuda:90 forward 72": [64, 32, {"num_warps": 4, "num_stages": 1}]}')
    monkeypatch.setenv("TRITON_SP_TUNED", str(path))
    ct.launch.tuned.cache_clear()
    with compiling_for("sm_90", {}):
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
        assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", ptx)) == expected
        assert "mma_async.sync.aligned.m64n128k16.f32.f16.f16" in ptx
