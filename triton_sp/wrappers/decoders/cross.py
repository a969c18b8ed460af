"""Layers of a decoder that attend to another sequence: the states of images, in Mllama.

For the text such a layer works token by token. Every rank has all states as keys, and its own tokens as queries. So
nothing is exchanged: the layer's own attention runs, with a mask that lets each token see the states of its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_sp.wrappers.inputs.layout import TextCall

STATES, MASK, ROWS = "cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"
NAMES = (STATES, MASK, ROWS)


def localise(arguments: dict[str, Any], call: TextCall) -> None:
    """Replace the states of all rows (B ..., C) by one sequence (1, N, C), and the masks of all tokens by those of this
    rank's: (B, 1, S, n), added to scores, by (1, 1, T, N), and (B, 1, S, 1), a factor, by (1, 1, T, 1)."""
    if arguments.get(STATES) is None:
        return
    index, (rows, length) = call.local_index, call.shape
    states: Tensor = arguments[STATES].reshape(rows, -1, arguments[STATES].shape[-1])
    count = states.shape[1]
    arguments[STATES] = states.flatten(0, 1)[None]
    given = arguments.get(MASK)
    added = states.new_zeros(len(index), count) if given is None else given[:, 0].flatten(0, 1)[index]
    row = torch.arange(rows, device=index.device).repeat_interleave(count)
    other = row != (index // length)[:, None]
    arguments[MASK] = added.repeat(1, rows).masked_fill(other, torch.finfo(added.dtype).min)[None, None]
    if arguments.get(ROWS) is not None:
        arguments[ROWS] = arguments[ROWS][:, 0].flatten(0, 1)[index][None, None]
