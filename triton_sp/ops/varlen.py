"""The operator of the stage attend: attention of packed tokens, each segment by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from triton_sp.kernels.mask import Grads, Mask, States
from triton_sp.ops import attend_cpu, dispatch
from triton_sp.ops.backends.adapter import Call, Results
from triton_sp.ops.checks import check_call, check_sinks, check_values
from triton_sp.ops.differentiable import once_differentiable

if TYPE_CHECKING:
    from triton_sp.ops.backends.choice import Choice


@overload
def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mask: Mask,
    *,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed tokens, each segment by itself.

    Args:
        q_THD: queries (T, H, D), with any strides. One that is not contiguous along D is copied.
        k_TKD: keys (T_k, K, D) with H a multiple of K, in the dtype of q.
        v_TKD: values (T_k, K, V), in the dtype of q. V need not be D (DeepSeek-V3, arXiv:2412.19437, has 128 and 192).
        mask: which keys each row sees, see `Mask`.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        softmax_scale: factor of the scores, above 0; None for 1 / sqrt(D).
        sinks: (H,), a score for each query head that takes part in the softmax of its rows, beside those of the keys
            (gpt-oss, arXiv:2508.10925). Learned: it has a gradient.
        return_lse: also return the natural logarithm of each row's sum of exponentials, that of the sink included.

    Returns:
        (T, H, V) in the dtype of q. Rows without a key, and rows past cu_seqlens_q[-1], are 0. With `return_lse` also
        (T, H) in fp32, -inf for such rows; both are differentiable. Gradients are
        equal bit for bit from run to run, but for one kernel, on sm_90 after a self-check; with
        torch.use_deterministic_algorithms and under torch.compile it is not used. Under autocast, as for PyTorch's own
        attention, inputs are converted to its dtype.

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit; and cu_seqlens that do not start at 0, decrease
            or end past the tokens. Their values are looked at where that is free, on the CPU; on a GPU it would wait
            for the device, so there only if TRITON_SP_DEBUG=1, and unchecked ones never make a kernel read or write
            outside its tensors.
        UnsupportedKernelError: a head dim or dtype that the kernels of this device do not exist for. They exist for
            multiples of 8 from 16 to 256 in bf16, fp16 and fp32; the reference takes any.

    >>> import torch
    >>> v = torch.tensor([1.0, 3.0, 10.0]).view(3, 1, 1).expand(3, 1, 64)
    >>> q = torch.zeros(3, 1, 64)
    >>> varlen_attention(q, q, v, Mask(torch.tensor([0, 2, 3])))[:, 0, 0].tolist()
    [2.0, 2.0, 10.0]
    >>> varlen_attention(q, q, v, Mask(torch.tensor([0, 2, 3]), causal=True))[:, 0, 0].tolist()
    [1.0, 2.0, 10.0]
    >>> prefix = torch.tensor([[0, 0, 0], [2, 2, 3]])  # the first two tokens see one another, the third sees all
    >>> varlen_attention(q, q, v, Mask(torch.tensor([0, 3]), key_ranges=prefix))[:2, 0, 0].tolist()
    [2.0, 2.0]
    >>> varlen_attention(q, q, v, Mask(torch.tensor([0, 2, 3])), sinks=torch.zeros(1))[:, 0, 0].mul(3).round().tolist()
    [4.0, 4.0, 15.0]
    """
    check_call(q_THD, k_TKD, v_TKD, mask, softcap, softmax_scale)
    check_sinks(sinks, q_THD)
    device = q_THD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_THD, k_TKD, v_TKD = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q_THD, k_TKD, v_TKD))
    factors = (q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, softcap or 0.0)
    states = (q_THD, k_TKD, v_TKD) if sinks is None else (q_THD, k_TKD, v_TKD, sinks)
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():
            out, lse_HT = attend(states, present(mask), mask.causal, mask.window, *factors)
        else:
            out, lse_HT = _Attend.apply(mask, *factors, None, *states)
    return (out, lse_HT.transpose(0, 1)) if return_lse else out


def attend_eagerly(
    states: Sequence[Tensor], mask: Mask, *, softmax_scale: float, softcap: float, attention: Choice | None
) -> Tensor:
    """`varlen_attention` of q, k, v and perhaps sinks that are checked, by whom `attention` chooses; None for ours."""
    with torch.autocast(states[0].device.type, enabled=False):
        return _Attend.apply(mask, softmax_scale, softcap, attention, *states)[0]  # type: ignore[no-any-return]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None = None,
    attention: Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and the log-sum-exp (H, T), without a gradient, by the implementation that is chosen here."""
    if attention is not None:
        call = Call(q, k, v, mask, softmax_scale, softcap, sinks)
        if adapter := attention.pick("forward", call):
            return adapter.forward(call)
    chosen = dispatch.implementation(q.device)
    check_values(len(q), len(k), mask)
    if chosen == "reference":
        return attend_cpu.attend(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)
    from triton_sp.kernels import attend as kernel  # here, so that the package imports without Triton

    if chosen == "gluon" and sinks is None:
        from triton_sp.kernels.hopper import attend as hopper

        if hopper.takes(q, k, v, mask, softcap):
            return hopper.forward(q, k, v, mask, softmax_scale=softmax_scale)
    return kernel.forward(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    states: Sequence[Tensor],
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float,
    grads: States | None = None,
    attention: Choice | None = None,
) -> Grads:
    """The gradients of `forward`, whose q, k, v, out and log-sum-exp are `states`, and its sinks the last of them if it
    had any; in `grads` where these are given."""
    q, k, v, out, lse, *others = states
    sinks = next(iter(others), None)
    if attention is not None and dlse is None:
        call = Call(q, k, v, mask, softmax_scale, softcap, sinks)
        if adapter := attention.pick("backward", call):
            grads = grads or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
            adapter.backward(call, Results(dout, out, lse), grads)
            return Grads(*grads)
    factors = {"softmax_scale": softmax_scale, "softcap": softcap}
    if sinks is None and dispatch.portable(q.device) == "triton" and not torch.are_deterministic_algorithms_enabled():
        from triton_sp.kernels.hopper import gate  # here, so that the package imports without Triton

        if gate.verdict(q.device, gate.BACKWARD).passed:
            from triton_sp.kernels.hopper import backward as hopper

            if hopper.takes(q, k, v, dout, mask, softcap):
                states = (q, k, v, out, lse)
                return Grads(*hopper.backward(dout, dlse, *states, mask, softmax_scale=softmax_scale, grads=grads))
    return backward_in_order(dout, dlse, states, mask, **factors, grads=grads)


def backward_in_order(
    dout: Tensor,
    dlse: Tensor | None,
    states: Sequence[Tensor],
    mask: Mask,
    *,
    softmax_scale: float,
    softcap: float,
    grads: States | None = None,
) -> Grads:
    """`backward` with sums in a fixed order, so that gradients are equal bit for bit from run to run."""
    q, k, v, out, lse, *others = states
    sinks = next(iter(others), None)
    factors = {"softmax_scale": softmax_scale, "softcap": softcap, "sinks": sinks, "grads": grads}
    if dispatch.portable(q.device) == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return attend_cpu.attend_backward(dout, dlse, (q, k, v, out, lse), mask, **factors)
    from triton_sp.kernels import attend_backward as kernel

    return kernel.backward(dout, dlse, q, k, v, out, lse, mask, **factors)


class _Attend(torch.autograd.Function):
    """The eager way: a registered operator costs the host 50 to 160 us more (measured on a CPU)."""

    @staticmethod
    def forward(
        ctx: Any, mask: Mask, softmax_scale: float, softcap: float, attention: Choice | None, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # mostly the log-sum-exp has no gradient: no zeros for it
        ctx.mask, ctx.factors = mask, {"softmax_scale": softmax_scale, "softcap": softcap, "attention": attention}
        q, k, v, *sinks = states
        out, lse = forward(q, k, v, mask, **ctx.factors, sinks=next(iter(sinks), None))
        ctx.save_for_backward(q, k, v, out, lse, *sinks)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        states = ctx.saved_tensors  # once: a checkpoint gives each tensor a single time
        dout = torch.zeros_like(states[3]) if dout is None else dout
        grads = backward(dout, dlse, states, ctx.mask, **ctx.factors)
        return None, None, None, None, *[grad for grad in grads if grad is not None]


# --- the same as registered operators, for torch.compile -------------------------------------------------------------


@torch.library.custom_op("triton_sp::attend", mutates_args=())
def attend(
    states: list[Tensor],
    tables: list[Tensor],
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (T, H, V) and the log-sum-exp (H, T) of q, k, v and perhaps sinks, of a mask with these tables: `present`."""
    (q, k, v, *sinks), mask = states, _mask(tables, causal, window)
    return forward(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=next(iter(sinks), None))


def present(mask: Mask) -> list[Tensor]:
    """The tables of a mask that are there, as the registered operators take them: an operator whose list may hold None
    can't have a gradient formula (torch 2.13)."""
    return [table for table in mask.tables if table is not None]


def _mask(tables: list[Tensor], causal: bool, window: int | None) -> Mask:
    """The mask again. Of the tables that may be missing `key_ranges` is the one with two axes."""
    cu_seqlens_q, cu_seqlens_k, *others = tables
    seqused_k = next((table for table in others if table.ndim == 1), None)
    key_ranges = next((table for table in others if table.ndim == 2), None)
    return Mask(cu_seqlens_q, cu_seqlens_k, seqused_k, key_ranges, causal, window)


def empty_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like out (T, H, V) and the log-sum-exp (H, T) of a forward, without their numbers."""
    lse_HT = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse_HT


@attend.register_fake
def _(states: list[Tensor], *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return empty_results(*states[:3])


@torch.library.custom_op("triton_sp::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    states: list[Tensor],
    tables: list[Tensor],
    causal: bool,
    window: int | None,
    softmax_scale: float,
    softcap: float,
) -> list[Tensor]:
    """The gradients of `attend`; `states` are its q, k, v, out, log-sum-exp and perhaps sinks."""
    mask = _mask(tables, causal, window)
    *grads, dsinks = backward_in_order(dout, dlse, states, mask, softmax_scale=softmax_scale, softcap=softcap)
    return grads if dsinks is None else [*grads, dsinks.to(states[5].dtype)]


@attend_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, states: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in [*states[:3], *states[5:]]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    (q, k, v, *sinks), tables, *ctx.settings = inputs
    ctx.states = 5 + len(sinks)
    ctx.save_for_backward(q, k, v, *output, *sinks, *tables)


def _registered_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    states, tables = saved[: ctx.states], saved[ctx.states :]
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    return attend_backward(dout, dlse, states, tables, *ctx.settings), [None] * len(tables), None, None, None, None


attend.register_autograd(_registered_backward, setup_context=_setup)
