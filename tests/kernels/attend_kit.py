"""What the cases of the attend kernels are made of: calls, and an oracle of their own. It is dense, knows no segments
but through a mask, and shares no code with the library."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from triton_sp.kernels.mask import Mask
from triton_sp.ops.varlen import varlen_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter is wrong in bf16
MAIN = DTYPES[-1] if ON_GPU else torch.float32
STRETCH = 12 if ON_GPU else 1  # tiles are 32 x 16 in the interpreter, up to 128 x 128 on a GPU


@dataclass
class Case:
    """One call. Lengths are stretched to the tiles of the device."""

    q: list[int] = field(default_factory=lambda: [40, 0, 9])
    k: list[int] | None = None
    used: list[int] | None = None
    slack: int = 3
    heads: int = 2
    k_heads: int = 1
    dim: int = 64
    v_dim: int = 0  # 0: dim
    dtype: torch.dtype = MAIN
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sees: Callable[[int, int, int], tuple[int, int]] | None = None  # row of a segment, its rows and keys -> first, stop

    def __post_init__(self):
        self.q = [n * STRETCH for n in self.q]
        self.k = self.q if self.k is None else [n * STRETCH for n in self.k]
        self.used = None if self.used is None else [n * STRETCH for n in self.used]
        self.v_dim = self.v_dim or self.dim
        self.window = None if self.window is None else self.window * STRETCH

    def tensors(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows, keys = sum(self.q) + self.slack, sum(self.k) + self.slack
        shapes = [(rows, self.heads, self.dim), (keys, self.k_heads, self.dim)]
        shapes += [(keys, self.k_heads, self.v_dim), (rows, self.heads, self.v_dim)]
        return [torch.randn(*s, generator=generator).to(DEVICE, self.dtype) for s in shapes]

    def tables(self):
        def table(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)

        used = None if self.used is None else torch.tensor(self.used, dtype=torch.int32, device=DEVICE)
        return table(self.q), table(self.k), used

    def key_ranges(self):
        """Of all rows, those of the slack too."""
        if self.sees is None:
            return None
        starts = [sum(self.k[:i]) for i in range(len(self.k))]
        ranges = [
            [start + bound for bound in self.sees(row, n, n_k)]
            for start, n, n_k in zip(starts, self.q, self.k, strict=True)
            for row in range(n)
        ]
        ranges += [[sum(self.k)] * 2] * self.slack
        return torch.tensor(ranges, dtype=torch.int32, device=DEVICE).T

    def call(self, q, k, v, return_lse=False, **more):
        factors = {"softcap": self.softcap, "softmax_scale": self.scale}
        return varlen_attention(q, k, v, self.mask(), return_lse=return_lse, **factors, **more)

    def mask(self):
        return Mask(*self.tables(), self.key_ranges(), self.causal, self.window)

    def dense_mask(self):
        """(T, T_k) bool, by the definition: row by row."""
        rows, keys = sum(self.q) + self.slack, sum(self.k) + self.slack
        mask = torch.zeros(rows, keys, dtype=torch.bool)
        start, k_start = 0, 0
        for i, (n, n_k) in enumerate(zip(self.q, self.k, strict=True)):
            seen = n_k if self.used is None else self.used[i]
            for row in range(n):
                position = row + seen - n
                low = 0 if self.window is None else max(0, position - self.window + 1)
                ahead = 0 if self.causal else math.inf if self.window is None else self.window - 1
                high = min(seen, position + 1 + ahead)
                if self.sees is not None:
                    low, high = self.sees(row, n, n_k)
                    low, high = max(low, 0), min(high, seen)
                if high > low:
                    mask[start + row, k_start + low : k_start + int(high)] = True
            start, k_start = start + n, k_start + n_k
        return mask.to(DEVICE)

    def oracle(self, q, k, v, dtype, sinks=None):
        """out and log-sum-exp by the textbook, everything in `dtype`."""
        q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(self.heads // self.k_heads, 0) for x in (k, v))
        s = q @ k.transpose(1, 2) * (self.dim**-0.5 if self.scale is None else self.scale)
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        s = s.masked_fill(~self.dense_mask(), -math.inf)
        sink = s[..., :0] if sinks is None else sinks.to(dtype)[:, None, None].expand(-1, s.shape[1], 1)
        lse = torch.logsumexp(torch.cat([s, sink], -1), -1)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
        return (p @ v).transpose(0, 1), lse.transpose(0, 1)


def gradients(case, tensors, attend):
    """[out, dq, dk, dv] of a function of q, k, v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    out = attend(q, k, v)
    out.backward(tensors[3].to(out.dtype))
    return [x.double() for x in (out.detach(), q.grad, k.grad, v.grad)]


def assert_exact(case, tensors=None, attend=None):
    """The tolerance rule: no worse than 2 (gradients 3) times the error of the textbook in the same dtype."""
    tensors = case.tensors() if tensors is None else tensors
    found = gradients(case, tensors, attend or case.call)
    exact = gradients(case, [x.double() for x in tensors], lambda *x: case.oracle(*x, torch.float64)[0])
    plain = gradients(case, tensors, lambda *x: case.oracle(*x, case.dtype)[0])
    for name, ours, wanted, usual in zip(("out", "dq", "dk", "dv"), found, exact, plain, strict=True):
        if not ours.numel():
            continue
        error, allowed = (ours - wanted).abs(), (usual - wanted).abs()
        factor, slack = (2 if name == "out" else 3), 2e-5
        assert error.max() <= factor * allowed.max() + slack, (name, case, error.max(), allowed.max())
        assert error.mean() <= factor * allowed.mean() + slack, (name, case, error.mean(), allowed.mean())


# In the interpreter a case takes seconds: each head dim in one dtype there, `make interpreter` has the others.
LATER = [] if ON_GPU else [pytest.mark.long]


GUARD = 1 << 14  # elements of NaN before and after each tensor


def guarded(x):
    """A copy of x in the middle of NaN, and a function that says whether all of that is still there."""
    page = torch.full((x.numel() + 2 * GUARD,), math.nan, dtype=x.dtype, device=x.device)
    inside = page[GUARD:-GUARD].view(x.shape)
    inside.copy_(x)
    return inside, lambda: bool(page[:GUARD].isnan().all() & page[-GUARD:].isnan().all())


def prefix(row, rows, keys):
    return 0, max(row + 1, 2 * rows // 3)


def cut_blocks(row, rows, keys):
    """Blocks of a third of the segment, of which a window leaves out the beginning."""
    third = max(rows // 3, 1)
    return max(row - rows // 4, 0), min((row // third + 1) * third, rows)


def inner(row, rows, keys):
    """Rows from within a longer segment: with keys ahead of the last row, rows without a key, keys without a row."""
    return (keys // 4 + row // 2, keys // 4 + row // 2 + max(0, 2 * (row - rows // 4)))
