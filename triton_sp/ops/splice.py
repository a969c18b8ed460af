"""The operator of the stage fuse: a rank's rows of text and of visual features become the rows of its tokens."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from triton_sp.errors import InputError
from triton_sp.ops import reference
from triton_sp.ops.dispatch import implementation


@torch.library.custom_op("triton_sp::splice", mutates_args=())
def _splice(text_SC: Tensor, visual_VC: Tensor, index_T: Tensor) -> Tensor:
    return _rows(text_SC, visual_VC, index_T)


@torch.library.custom_op("triton_sp::splice_backward", mutates_args=())
def _splice_backward(grad_TC: Tensor, index_T: Tensor, texts: int, visuals: int) -> list[Tensor]:
    """The gradients of text and visual: of each row its token's, 0 without one."""
    index = index_T.long()
    return [_rows(None, grad_TC, _tokens(-1 - index, texts)), _rows(None, grad_TC, _tokens(index, visuals))]


def _tokens(rows_T: Tensor, count: int) -> Tensor:
    """The token of each of `count` rows, or -1; entries of other rows are passed over, without asking the device."""
    token = torch.arange(len(rows_T), device=rows_T.device)
    tokens = token.new_full((count + 1,), -1)  # a last entry for what is passed over
    return tokens.scatter_(0, rows_T.where((rows_T >= 0) & (rows_T < count), count), token)[:count]


def _rows(text: Tensor | None, visual: Tensor, index: Tensor) -> Tensor:
    if implementation(index.device) == "reference":
        return reference.splice(text, visual, index)
    from triton_sp.kernels import splice as kernels

    return kernels.splice(text, visual, index)


@_splice.register_fake
def _(text_SC: Tensor, visual_VC: Tensor, index_T: Tensor) -> Tensor:
    return text_SC.new_empty(len(index_T), text_SC.shape[1])


@_splice_backward.register_fake
def _(grad_TC: Tensor, index_T: Tensor, texts: int, visuals: int) -> list[Tensor]:
    return [grad_TC.new_empty(rows, grad_TC.shape[1]) for rows in (texts, visuals)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, visual, index = inputs
    ctx.save_for_backward(index)
    ctx.sizes = len(text), len(visual)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return *_splice_backward(grad, index, *ctx.sizes), None


_splice.register_autograd(_backward, setup_context=_setup)


def splice(text_SC: Tensor, visual_VC: Tensor, index_T: Tensor) -> Tensor:
    """A row of text or of visual features for each token: one pass over memory, forward and backward.

    Args:
        text_SC: embeddings, strided in any way.
        visual_VC: visual features, of the same dtype and width.
        index_T: int32 or int64: the visual row of each token, or -1 - s for row s of text; -1 - S for a row of 0. Other
            rows are used at most once. Values are checked on the CPU, and on a GPU if TRITON_SP_DEBUG=1.

    Returns:
        (T, C).

    Raises:
        InputError: shapes, dtypes or indices that do not fit one another.

    >>> text, visual = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[8.0], [9.0]])
    >>> splice(text, visual, torch.tensor([-1, 1, -3, -4])).flatten().tolist()
    [1.0, 9.0, 3.0, 0.0]
    """
    _check(text_SC, visual_VC, index_T)
    return _splice(text_SC, visual_VC, index_T)


def _check(text: Tensor, visual: Tensor, index: Tensor) -> None:
    if text.ndim != 2 or visual.ndim != 2 or text.shape[1] != visual.shape[1] or text.dtype != visual.dtype:
        raise InputError(
            "text, visual",
            expected="(S, C) and (V, C) of one dtype",
            found=f"{text.dtype} {tuple(text.shape)} and {visual.dtype} {tuple(visual.shape)}",
            remedy="project visual features to the width and dtype of the embeddings",
        )
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64) or index.device != text.device:
        raise InputError(
            "index",
            expected=f"int32 or int64 (T,) on {text.device}",
            found=f"{index.dtype} of shape {tuple(index.shape)} on {index.device}",
            remedy="give the row of each token",
        )
    if not len(index) or not (index.is_cpu or os.environ.get("TRITON_SP_DEBUG") == "1"):
        return
    used = index[index > -1 - len(text)]
    if int(index.min()) < -1 - len(text) or int(index.max()) >= len(visual) or len(used.unique()) < len(used):
        raise InputError(
            "index",
            expected=f"different rows of {len(visual)} visual rows (>= 0) and {len(text)} rows of text (< 0)",
            found=f"{index.sort().values[[0, -1]].tolist()} as the least and the greatest of {len(index)}",
            remedy="give each token a row of its own",
        )
