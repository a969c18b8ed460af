"""The attend kernels against the oracle of attend_kit.py, on the device at hand: Triton's interpreter or a GPU.

Not collected by itself: tests/test_attend.py runs it in a process with TRITON_INTERPRET=1, `make gpu` on a GPU.
"""

import math

import pytest
import torch
from attend_kit import (
    DEVICE,
    DTYPES,
    LATER,
    MAIN,
    ON_GPU,
    STRETCH,
    Case,
    assert_exact,
    cut_blocks,
    gradients,
    inner,
    prefix,
)
from torch.utils.checkpoint import checkpoint

from triton_sp.errors import InputError, UnsupportedKernelError
from triton_sp.kernels.mask import Mask
from triton_sp.ops import dispatch
from triton_sp.ops.varlen import present, varlen_attention

DIMS = [64, 72, 80, 88, 96, 128, 256, 16, 56, 104, 160, 192]
# Of the interpreter; dims of 64 are among the masks, 96 among the small ones.
SUITE = [(72, torch.float16), (80, torch.float32)]


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        pytest.param(dim, dtype, marks=[] if (dim, dtype) in SUITE else LATER)
        for dim in (DIMS if ON_GPU else [64, 72, 80, 96])
        for dtype in DTYPES
    ],
)
def test_head_dims(dim, dtype):
    if ON_GPU and dtype == torch.float32 and dim > 80:
        pytest.skip("exact fp32 products take the compiler up to half a minute")
    assert_exact(Case(dim=dim, dtype=dtype))


@pytest.mark.skipif(ON_GPU, reason="covered by test_head_dims")
@pytest.mark.parametrize(
    "dim",
    [pytest.param(dim, marks=[] if dim in (16, 40, 56, 104, 152, 256) else LATER) for dim in range(16, 257, 8)],
)
def test_head_dims_small(dim):
    assert_exact(Case([17, 5], dim=dim, heads=1, dtype=torch.float16))


@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (24, 72), (64, 16)])
def test_head_dim_of_v(dim, v_dim):
    assert_exact(Case([17, 5], dim=dim, v_dim=v_dim, causal=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(causal=True, heads=4, k_heads=2),
        Case([20, 33], [40, 7], causal=True),  # bottom-right aligned; rows without a key
        pytest.param(Case([20, 33], [40, 7]), marks=LATER),
        Case(window=6, causal=True),
        pytest.param(Case(window=6), marks=LATER),
        Case([33, 9], [20, 40], window=5),
        Case(softcap=2.0, scale=0.5),
        Case([8, 20], [40, 21], [24, 20], causal=True),  # a range of rows of a segment: keys up to its end
        pytest.param(Case([8, 20], [40, 21], [24, 0]), marks=LATER),
        Case([9, 0], [0, 9]),
    ],
    ids=str,
)
def test_masks(case):
    assert_exact(case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(sees=prefix, dim=72), id="prefix", marks=LATER),
        pytest.param(Case([36, 33], sees=cut_blocks, softcap=2.0), id="cut blocks"),
        pytest.param(Case([20, 9], [48, 40], sees=inner), id="inner", marks=LATER),
        pytest.param(Case([20, 9], [48, 40], [40, 0], sees=inner, heads=1), id="inner with keys left out"),
    ],
)
def test_key_ranges(case):
    assert_exact(case)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 5, 0], [1], [16, 32]])
def test_empty_and_whole_tiles(lengths):
    assert_exact(Case(lengths, slack=0 if sum(lengths) else 4, heads=1))


def with_each(case, *masks):
    """[out, lse, dq, dk, dv] of the kernels, with each of these masks."""
    from triton_sp.kernels import attend, attend_backward

    (q, k, v, dout), results = case.tensors(), []
    for mask in masks:
        out, lse = attend.forward(q, k, v, mask, softmax_scale=0.125)
        found = attend_backward.backward(dout, None, q, k, v, out, lse, mask, softmax_scale=0.125)
        results.append([out, lse, *found[:3]])
    return results


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case([40, 9, 35], heads=4, k_heads=2, causal=True), id="grouped", marks=LATER),
        pytest.param(Case([9, 40], causal=True), id="causal"),
        pytest.param(Case([20, 9, 0], [48, 40, 3], sees=inner), id="ranges"),
    ],
)
def test_tiles_in_another_order(case):
    # Heaviest first, by a table that the mask keeps: the same tiles, so the same results bit for bit.
    kept = case.mask()._replace(kept={})
    results = with_each(case, case.mask(), kept)
    assert kept.kept and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tiles_of_windows():
    # Where the host knows that no segment is long, tiles are as short: other sums, the same results.
    from triton_sp.kernels import launch

    case = Case([5, 0, 3], dim=80)
    results = with_each(case, case.mask(), case.mask()._replace(max_seqlens=(5 * STRETCH, 5 * STRETCH)))
    torch.testing.assert_close(*results, rtol=2e-2 if ON_GPU else 1e-5, atol=1e-2 if ON_GPU else 1e-5)
    if launch.target() in ("interpreter", "cuda:90"):
        tiles = [launch.find_launch("forward", 80, 80, MAIN, longest).rows for longest in (None, 65, 64)]
        assert tiles[0] == tiles[1] == 2 * tiles[2]


def test_grouped_heads_in_one_program(monkeypatch):
    from triton_sp.kernels import launch

    monkeypatch.setattr(launch, "processors", lambda device: 0)  # as if key heads were enough to fill the device
    assert_exact(Case([40, 9], heads=4, k_heads=2, causal=True))


def test_lse_and_its_gradient():
    case = Case([20, 9], [12, 9], causal=True, dtype=torch.float32)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors())
    out, lse = case.call(q, k, v, return_lse=True)
    weight = torch.randn(lse.shape, device=DEVICE)
    (out.sum() + (lse.masked_fill(lse == -math.inf, 0) * weight).sum()).backward()
    found = [x.grad for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, exact = case.oracle(*wide, torch.float64)
    (out.sum() + (exact.masked_fill(exact == -math.inf, 0) * weight).sum()).backward()
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-5)
    for ours, wanted in zip(found, wide, strict=True):
        torch.testing.assert_close(ours.double(), wanted.grad, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        Case([20, 9], causal=True, dim=72, v_dim=40),
        Case([20, 13], [30, 7], causal=True, window=6, heads=1),  # rows without a key see the sink alone
        Case([20, 9], sees=prefix, softcap=2.0),
    ],
    ids=["grouped", "rows without a key", "ranges"],
)
def test_sinks(case):
    case.dtype, rows = torch.float32, sum(case.q)
    *states, dout = case.tensors()
    states.append(torch.linspace(-2.0, 3.0, case.heads, device=DEVICE))
    weight = torch.randn(rows, case.heads, device=DEVICE)

    def results(attend, dtype, dout):
        leaves = [x.to(dtype).requires_grad_() for x in states]
        out, lse = attend(*leaves)
        return [out[:rows], lse[:rows], *torch.autograd.grad((out * dout).sum() + (lse[:rows] * weight).sum(), leaves)]

    wanted = results(lambda q, k, v, sinks: case.oracle(q, k, v, torch.float64, sinks), torch.float64, dout)
    dout[rows:] = math.nan  # the slack has no sink, and what is in it is not read
    found = results(lambda q, k, v, sinks: case.call(q, k, v, True, sinks=sinks), torch.float32, dout)
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=3e-5, rtol=1e-4)


def test_gradient_of_lse_alone():
    case = Case([9], heads=1)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors())
    case.call(q, k, v, return_lse=True)[1][:9].sum().backward()
    assert v.grad.abs().max() == 0 and q.grad.abs().max() > 0


def test_nan_stays_in_its_segment():
    case = Case([20, 20], slack=4, heads=1, dim=72)
    clean = case.tensors()
    expected = gradients(case, clean, case.call)
    first = case.q[0]
    for rows in (slice(sum(case.q), None), slice(first, first + case.q[1])):
        poisoned = [x.clone() for x in clean]
        for x in poisoned:
            x[rows] = math.nan
        for ours, wanted in zip(gradients(case, poisoned, case.call), expected, strict=True):
            assert torch.equal(ours[:first], wanted[:first])
            assert not ours[sum(case.q) :].any()  # slack is 0, whatever it holds


def test_keys_left_out_never_leak():
    case = Case([9], [30], [11], heads=1, slack=0)
    tensors = case.tensors()
    expected = gradients(case, tensors, case.call)
    for x in tensors[1:3]:
        x[case.used[0] :] = math.nan
    for ours, wanted in zip(gradients(case, tensors, case.call), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_strides():
    case = Case([20, 9], heads=2, k_heads=2, dim=72, slack=0)
    rows = sum(case.q)
    packed = torch.randn(rows, 3, 2, 72, device=DEVICE, dtype=MAIN)  # token-major, as the exchange's buffer
    assert_exact(case, [*packed.unbind(1), torch.randn(2, rows, 72, device=DEVICE, dtype=MAIN).transpose(0, 1)])
    odd = torch.randn(rows, 2, 75, device=DEVICE, dtype=MAIN)[..., :72]  # strides that no vector load can have
    last = torch.randn(rows, 72, 2, device=DEVICE, dtype=MAIN).transpose(1, 2)  # not contiguous along D
    expanded = torch.randn(1, 1, 1, device=DEVICE, dtype=MAIN).expand(rows, 2, 72)
    assert_exact(case, [odd, last, odd, expanded])


def test_out_is_written_in_place():
    from triton_sp.kernels import attend

    case = Case([20], heads=2, k_heads=2, slack=0)
    q, k, v, _ = case.tensors()
    buffer = torch.zeros(sum(case.q), 2, 2, 64, device=DEVICE, dtype=MAIN)
    attend.forward(q, k, v, case.mask(), softmax_scale=0.125, out_THD=buffer[:, 1])
    assert torch.equal(buffer[:, 1], case.call(q, k, v)) and not buffer[:, 0].any()


def test_offsets_past_two_to_the_31():
    stride, rows = (1 << 24) - 8, 200
    case = Case([4], heads=1, slack=0)
    case.q = case.k = [rows]
    tensors = case.tensors()
    far = torch.empty(stride * (rows - 1) + 64, device=DEVICE, dtype=torch.float16).as_strided(
        (rows, 1, 64), (stride, 64, 1)
    )
    assert far.stride(0) * (rows - 1) > 2**31
    q, k, v = (x.half() for x in tensors[:3])
    far.copy_(k)
    assert torch.equal(case.call(q, far, v), case.call(q, k, v))


def test_backward_is_bitwise_deterministic():
    case = Case([40, 9], heads=2, k_heads=1, causal=True)
    tensors = case.tensors()
    first = gradients(case, tensors, case.call)
    for _ in range(100 if ON_GPU else 1):
        again = gradients(case, tensors, case.call)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("with_sinks", [pytest.param(False, marks=LATER), True])
def test_op_is_well_formed(with_sinks):
    case = Case([9, 5], heads=2, dim=16)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors())
    states = [q, k, v] + [torch.zeros(2, device=DEVICE, requires_grad=True)] * with_sinks
    arguments = (states, present(case.mask()), True, None, 0.25, 0.0)
    torch.library.opcheck(torch.ops.triton_sp.attend.default, arguments)


def test_compile_checkpoint_and_autocast():
    case = Case([17, 5], heads=2, dim=16)
    tensors = case.tensors()
    expected = gradients(case, tensors, case.call)
    table = case.tables()[0]
    compiled = torch.compile(
        lambda *x: varlen_attention(*x, Mask(table)), fullgraph=True, backend="inductor" if ON_GPU else "aot_eager"
    )
    for attend in (compiled, lambda *x: checkpoint(case.call, *x, use_reentrant=False)):
        for ours, wanted in zip(gradients(case, tensors, attend), expected, strict=True):
            torch.testing.assert_close(ours, wanted)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert case.call(*tensors[:3]).dtype == torch.float16


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graph_with_padded_tables():
    case = Case([40, 9, 0, 0], heads=2, slack=15 * STRETCH)
    q, k, v, dout = case.tensors()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    table = case.tables()[0]

    def step():
        out = varlen_attention(q, k, v, Mask(table))
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([40, 9, 0, 0], [10, 20, 20, 7]):
        table.copy_(torch.tensor([0, *lengths]).cumsum(0) * STRETCH)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([1, 9]),
        torch.tensor([0, 9, 5, 9]),
        torch.tensor([0, 99]),
        torch.tensor([0.0, 9.0]),
        torch.zeros(1, 2).int(),
    ],
    ids=["start", "decreasing", "past the end", "dtype", "shape"],
)
def test_malformed_tables_raise(table, monkeypatch):
    monkeypatch.setenv("TRITON_SP_DEBUG", "1")
    x = torch.zeros(9, 1, 64, device=DEVICE)
    with pytest.raises(InputError, match="cu_seqlens_q"):
        varlen_attention(x, x, x, Mask(table.to(DEVICE)))


def test_tables_must_be_on_the_device_of_q():
    x = torch.zeros(9, 1, 64, device=DEVICE)
    with pytest.raises(InputError, match="on meta"):
        varlen_attention(x, x, x, Mask(torch.tensor([0, 9], device="meta")))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    rows, heads, dim = 140_032, 128, 128
    assert rows * heads * dim > 2**31
    q = torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    table = torch.arange(0, rows + 1, 64, device=DEVICE, dtype=torch.int32)
    out = varlen_attention(q, q, q, Mask(table))
    (grad,) = torch.autograd.grad(out, q, out.detach())
    last = q.detach()[-64:].clone().requires_grad_()
    alone = varlen_attention(last, last, last, Mask(table[:2]))
    assert torch.equal(out[-64:], alone)
    assert torch.equal(grad[-64:], torch.autograd.grad(alone, last, alone.detach())[0])


@pytest.mark.skipif(dispatch.implementation(DEVICE) != "gluon", reason="needs sm_90 and a self-check that has passed")
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_gluon_forward_with_the_portable_backward(dim):
    # Rows without a key, a tile of which none has one, neighbours that hold NaN, and what the tier leaves to the other.
    assert_exact(Case([40, 0, 9, 1], dim=dim, heads=4, k_heads=2, causal=True))
    assert_exact(Case([40, 20], [9, 40], dim=dim, causal=True, dtype=torch.float16))
    assert_exact(Case([40, 9], dim=dim, window=6))


def test_what_no_kernel_does_raises():
    table = torch.tensor([0, 9], device=DEVICE)
    for dim, v_dim, dtype in ((60, 64, torch.float32), (64, 264, torch.float32), (64, 64, torch.float64)):
        x, v = (torch.zeros(9, 1, size, device=DEVICE, dtype=dtype) for size in (dim, v_dim))
        with pytest.raises(UnsupportedKernelError, match="expected"):
            varlen_attention(x, x, v, Mask(table))
