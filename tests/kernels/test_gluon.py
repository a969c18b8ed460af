"""The Hopper kernels as Python (gluon_twin.py), against a textbook in float64."""

from __future__ import annotations

import csv
import inspect
import os
import textwrap

import pytest
import torch

pytest.importorskip("triton")

import gluon_table
import gluon_twin as twin
from compiling import SHARED_LIMIT

from triton_sp.kernels import launch
from triton_sp.kernels.hopper import backward as hopper
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.mask import Mask

ROWS, KEYS = 32, 64  # smaller than on a GPU, for more blocks of fewer numbers

with open(gluon_table.TABLE, newline="") as _file:
    TABLE = list(csv.DictReader(_file))


def textbook(q, k, v, dout, mask):
    """dq, dk, dv by autograd, segment by segment; 0 where there is nothing."""
    leaves = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
    total = leaves[0].sum() * 0.0
    lse = torch.full(q.shape[1::-1], -torch.inf, dtype=torch.float64)
    out = torch.zeros_like(q)
    tables = [mask.tables[0].tolist(), mask.tables[1].tolist()]
    for i in range(len(tables[0]) - 1):
        rows, keys = (slice(table[i], table[i + 1]) for table in tables)
        n, n_k = rows.stop - rows.start, keys.stop - keys.start
        if not n or not n_k:
            continue
        x, y, z = leaves[0][rows].transpose(0, 1), leaves[1][keys].transpose(0, 1), leaves[2][keys].transpose(0, 1)
        y, z = (part.repeat_interleave(q.shape[1] // k.shape[1], 0) for part in (y, z))
        ahead = torch.arange(n_k) - torch.arange(n_k - n, n_k)[:, None]
        s = (x @ y.mT * q.shape[-1] ** -0.5).masked_fill(ahead > mask.right, -torch.inf)
        part = s.logsumexp(-1)
        p = (s - part.detach().masked_fill(part == -torch.inf, 0.0)[..., None]).exp()
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-300)
        here = (p @ z).transpose(0, 1)
        out[rows], lse[:, rows] = here.detach(), part.detach()
        total = total + (here * dout[rows].nan_to_num()).sum()
    return out, lse, torch.autograd.grad(total + sum(x.sum() for x in leaves) * 0.0, leaves)


@pytest.mark.parametrize(
    ("dim", "q_lengths", "k_lengths", "heads", "k_heads", "causal"),
    [
        (72, [75, 0, 1, 32, 100], None, 2, 2, True),
        (128, [35, 0, 65, 5], [150, 9, 50, 0], 2, 1, True),  # more keys, fewer, and rows without a key
        pytest.param(64, [75, 0, 7, 64], None, 4, 2, False, marks=pytest.mark.long),
        pytest.param(80, [35, 65], [65, 32], 2, 1, False, marks=pytest.mark.long),
        (72, [], None, 1, 1, True),
    ],
)
def test_backward(dim, q_lengths, k_lengths, heads, k_heads, causal) -> None:
    """Every index, block, barrier and mask; a neighbour and what is past the last segment are NaN."""
    generator = torch.Generator().manual_seed(dim)
    k_lengths = q_lengths if k_lengths is None else k_lengths
    tables = [torch.tensor([0, *x]).cumsum(0).int() for x in (q_lengths, k_lengths)]
    rows, keys = sum(q_lengths) + 5, sum(k_lengths) + 5
    shapes = ((rows, heads), (keys, k_heads), (keys, k_heads), (rows, heads))
    states = [torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for shape in shapes]
    mask = Mask(*tables, causal=causal)
    for x, lengths in zip(states, (q_lengths, k_lengths, k_lengths, q_lengths), strict=True):
        x[sum(lengths) :] = torch.nan
    q, k, v, dout = states
    out, lse, wanted = textbook(*states, mask)
    scale, (d0, d1) = dim**-0.5, launch.split(dim)
    shift = torch.where(lse == -torch.inf, lse, -lse / scale).contiguous()
    delta = -(out * dout.nan_to_num()).sum(-1).T.contiguous()
    sums = [torch.zeros(*size, dim, dtype=torch.float64) for size in ((heads, rows), (k_heads, keys), (k_heads, keys))]
    parts = [
        twin.Descriptor(x, size, d1 if part else d0)
        for x, size in ((q, ROWS), (k, KEYS), (v, KEYS), (dout, ROWS))
        for part in (0, 1)
    ]
    segments = len(q_lengths)
    twin.run(
        hopper.attend_gluon_backward, (keys // KEYS + segments + 1, heads), *parts, *sums, shift, delta, *tables,
        rows, keys, segments, heads // k_heads, mask.right, launch.score_factors(scale, 0.0)[1],
        D=dim, D0=d0, D1=d1, BM=ROWS, BN=KEYS, STAGES=hopper.STAGES[dim],
    )  # fmt: skip
    for found, right, factor in zip(sums, wanted, (scale, scale, 1.0), strict=True):
        torch.testing.assert_close(found.transpose(0, 1) * factor, right, rtol=1e-9, atol=1e-9)


def test_a_wrong_index_is_found(monkeypatch) -> None:
    """The twin can fail: a block that is asked for one row too late, a barrier waited for in the wrong phase."""
    source = inspect.getsource(hopper.attend_gluon_backward.fn)
    for right, wrong in (
        ("start + (block + STAGES) * BM", "start + (block + STAGES) * BM + 1"),
        ("mbarrier.wait(dout_full, turn & 1)", "mbarrier.wait(dout_full, 0)"),
        ("seen + key, length)", "seen + key + 1, length)"),
    ):
        assert source.count(right) == 1
        space = vars(hopper).copy()
        exec(textwrap.dedent(source[source.index("def ") :].replace(right, wrong)), space)
        monkeypatch.setattr(hopper.attend_gluon_backward, "fn", space["attend_gluon_backward"])
        with pytest.raises(AssertionError):
            test_backward(72, [75, 130], None, 1, 1, True)
        monkeypatch.undo()


@pytest.mark.skipif(bool(gate.missing_api()), reason="this Triton's Gluon is not the one of the kernel")
@pytest.mark.parametrize("dim", hopper.STAGES)
def test_compiled(dim: int, tmp_path, monkeypatch) -> None:
    """As tests/data/gluon_backward_compiled.csv has it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path)))
    found = {key: str(value) for key, value in gluon_table.row(dim).items()}
    known = next((row for row in TABLE if (row["triton"], row["dim"]) == (found["triton"], str(dim))), found)
    assert found == known


def test_table_has_no_spill() -> None:
    """Every head dim, with no spill, products of whole warpgroups alone, and no more than an SM has."""
    assert [int(row["dim"]) for row in TABLE if row["triton"] == "3.6.0"] == list(hopper.STAGES)
    for row in TABLE:
        assert row["spill_bytes"] == row["stack_bytes"] == row["mma_sync"] == "0", row
        assert int(row["shared_bytes"]) <= SHARED_LIMIT["sm_90"], row
        assert float(row["issued_over_useful"]) <= (1.12 if row["dim"] == "72" else 1.0), row
