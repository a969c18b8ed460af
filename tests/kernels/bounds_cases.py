"""No table makes a kernel read or write outside its tensors: entries that are negative, decrease or are huge, in every
position of every table. Run as attend_cases.py is.

The first tests look at what all kernels have their addresses from, for every position and pair of positions; the last
runs whole kernels, forward and backward, inside of guard pages of NaN.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from attend_kit import DEVICE, LATER, MAIN, guarded

from triton_sp.kernels import attend, attend_backward
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.tiles import extent_keys, locate, reach, reach_in

ROWS, BLOCK = 24, 16
GOOD = [0, 7, 7, 20]
WRONG = (-(2**31), -1, 6, 2**31 - 1)


@triton.jit
def addresses(
    cu_q_ptr, cu_k_ptr, used_ptr, ranges_ptr, found_ptr, segments, rows, keys, RANGES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """For table number program_id(1): the rows and keys that its tile number program_id(0) would touch."""
    at = tl.program_id(1)
    cu_q_ptr += at * (segments + 1)
    cu_k_ptr += at * (segments + 1)
    segment, start, length, first = locate(tl.program_id(0), cu_q_ptr, segments, rows, BLOCK)
    k_start, k_length = extent_keys(segment, cu_k_ptr, used_ptr + at * segments, segments, keys)
    last = tl.minimum(BLOCK, length - first) - 1
    row = tl.arange(0, BLOCK)
    begin, end = 0, 0
    if first < length:
        if RANGES:
            _, _, begin, _, _, end = reach_in(
                ranges_ptr + at * 2 * rows, rows, start + first, last, row, k_start, k_length, BLOCK
            )
        else:
            shift = k_length - length
            _, _, begin, _, _, end = reach(
                first + row + shift, first + shift, last + first + shift, 3, 0, k_length, BLOCK
            )
    found_ptr += (at * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(found_ptr, segment)
    tl.store(found_ptr + 1, start)
    tl.store(found_ptr + 2, length)
    tl.store(found_ptr + 3, first)
    tl.store(found_ptr + 4, k_start)
    tl.store(found_ptr + 5, k_length)
    tl.store(found_ptr + 6, begin)
    tl.store(found_ptr + 7, end)


def spoiled(good, count):
    """`good` with `count` of its entries wrong, in every way."""
    for places in itertools.combinations(range(len(good)), count):
        for entries in itertools.product(WRONG, repeat=count):
            table = list(good)
            for place, entry in zip(places, entries, strict=True):
                table[place] = entry
            yield table


def touched(tables_q, tables_k, used, ranges=None):
    """What `addresses` finds, (tables, tiles, 8)."""

    def stack(tables):
        return torch.tensor(tables, dtype=torch.int64).to(DEVICE, torch.int32).contiguous()

    tables_q, tables_k, used = (stack(x) for x in (tables_q, tables_k, used))
    segments, tiles = tables_q.shape[1] - 1, ROWS // BLOCK + tables_q.shape[1]
    found = torch.full((len(tables_q), tiles, 8), -(2**31), dtype=torch.int32, device=DEVICE)
    pointer = tables_q if ranges is None else ranges
    addresses[(tiles, len(tables_q))](
        tables_q, tables_k, used, pointer, found, segments, ROWS, ROWS, RANGES=ranges is not None, BLOCK=BLOCK
    )
    return found.cpu()


def assert_inside(found):
    segment, start, length, first, k_start, k_length, begin, end = found.long().unbind(-1)
    assert (segment >= 0).all() and (segment < len(GOOD)).all()
    assert (start >= 0).all() and (length >= 0).all() and (start + length <= ROWS).all() and (first >= 0).all()
    assert (k_start >= 0).all() and (k_length >= 0).all() and (k_start + k_length <= ROWS).all()
    # Blocks begin below the number of keys: a load in one is masked at that number.
    assert (begin >= 0).all() and ((end <= begin) | ((end - 1) * BLOCK < k_length)).all()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=LATER)])
def test_addresses_of_every_malformed_table(count):
    tables = list(spoiled(GOOD, count))
    assert_inside(touched(tables, tables, [[9, 9, 9]] * len(tables)))
    wrong = list(spoiled([7, 0, 13], 1))
    assert_inside(touched([GOOD] * len(wrong), [GOOD] * len(wrong), wrong))
    # The unspoiled table: every row below its end is touched by one tile, no other is.
    rows = [(int(t[1] + t[3]), int(t[1] + t[2])) for t in touched([GOOD], [GOOD], [[9] * 3])[0] if t[3] < t[2]]
    assert sorted(row for a, b in rows for row in range(a, min(a + BLOCK, b))) == list(range(ROWS))


def test_addresses_of_malformed_ranges():
    wrong = list(itertools.product((0, 1), (0, 7, 19, 22), (-1000, 2**31 - 1, -(2**31))))
    ranges = torch.stack([torch.arange(ROWS), torch.arange(ROWS) + 1]).repeat(len(wrong), 1, 1).to(torch.int32)
    for at, (bound, place, entry) in enumerate(wrong):
        ranges[at, bound, place] = entry
    count = len(ranges)
    assert_inside(touched([GOOD] * count, [GOOD] * count, [[20] * 3] * count, ranges.contiguous().to(DEVICE)))


def table(entries):
    return torch.tensor(entries, dtype=torch.int32, device=DEVICE)


CU = [0, 20, 20, 44, 70]
MASKS = {
    "keys decrease": lambda: Mask(table(CU), table([0, 45, 20, 44, 70])),
    "keys negative": lambda: Mask(table(CU), table([0, 20, -1000, 44, 70]), causal=True),
    "keys huge": lambda: Mask(table(CU), table([0, 20, 20, 2**31 - 1, 70])),
    "int64 past int32": lambda: Mask(torch.tensor([0, 20, 2**33 + 20, 44, 70], device=DEVICE), causal=True),
    "more keys than there are": lambda: Mask(table(CU), seqused_k=table([-5, 9, 2**31 - 1, 1000])),
    "ranges": lambda: Mask(table(CU), key_ranges=table([[-1000, *range(79)], [*range(1, 80), 2**31 - 1]])),
}  # fmt: skip


def assert_stays_inside(mask, heads, allocated, monkeypatch):
    """Forward and backward of 80 rows: what is read past a tensor is NaN and would be seen in a result, what is written
    there is missing in the guard of one of the tensors that they allocate."""
    checks, empty = [], torch.empty

    def guarded_empty(*size, **options):
        inside, intact = guarded(torch.zeros(*size, **options))
        checks.append(intact)
        return inside

    shapes = [(80, heads), (80, 1), (80, 1), (80, heads)]
    q, k, v, dout = (guarded(torch.randn(*shape, 64, device=DEVICE, dtype=MAIN))[0] for shape in shapes)
    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded_empty(x.shape, dtype=x.dtype, device=x.device))
    out, lse = attend.forward(q, k, v, mask, softmax_scale=0.125)
    found = attend_backward.backward(dout, None, q, k, v, out, lse, mask, softmax_scale=0.125)
    monkeypatch.setattr(torch, "empty", empty)
    assert len(checks) == allocated and all(intact() for intact in checks)
    assert not any(x.isnan().any() for x in (out, lse, *found[:3]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "ranges" else LATER) for name in MASKS])
def test_kernels_stay_inside(name, monkeypatch):
    assert_stays_inside(MASKS[name](), heads=2, allocated=8, monkeypatch=monkeypatch)


MALFORMED = [
    pytest.param([*CU[:i], x, *CU[i + 1 :]], id=f"{x} at {i}", marks=[] if (x, i % 2) == (-1000, 1) else LATER)
    for i in range(len(CU))
    for x in (-1000, 45 if i < 3 else 19, 2**31 - 1, -(2**31), 10**9, -1)
]


@pytest.mark.parametrize("table", [*MALFORMED, pytest.param([0, -1000, -1000, 5], id="rows before the first")])
def test_malformed_tables_stay_in_bounds(table, monkeypatch):
    mask = Mask(torch.tensor(table, dtype=torch.int32, device=DEVICE), causal=True)
    # They allocate out, lse, dq, dk, dv and the rows' statistics.
    assert_stays_inside(mask, heads=1, allocated=6, monkeypatch=monkeypatch)
