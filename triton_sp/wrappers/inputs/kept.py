"""The layouts of the last batches of a wrapped model, for batches that are laid out alike: steps of one shape repeat.

A layout is kept by all that it is made of, bit for bit, so that no two can be taken for one another. On a million
tokens of 10,000 documents it takes 6 to 17 ms to make and 0.3 ms to find again (measured on a CPU, perf/plan.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_sp.anatomy.parts import Spans, Stack
from triton_sp.loss import IGNORE
from triton_sp.plan.cost import PlanChoice, find_link
from triton_sp.plan.segments import Segments
from triton_sp.ranks.groups import Group
from triton_sp.wrappers.inputs.batch import Batch
from triton_sp.wrappers.inputs.layout import TextCall, lay_out
from triton_sp.wrappers.install import Installation, Layouts
from triton_sp.wrappers.planning import plan_decoder

MOST = 4  # a layout holds 8 bytes for each token of the batch on its device


def lay_out_batch(installation: Installation, decoder: Stack, batch: Batch) -> TextCall:
    """The layout of a batch for a wrapped model; see `lay_out`."""
    config, group = installation.config, installation.group
    weight = next(decoder.module.parameters())
    # What else decides. A tensor that was made in inference mode is of no use for a step of training.
    how = (
        *(group, config, batch.device, weight.dtype, torch.is_inference_mode_enabled()),
        find_link(config.link, batch.device.type, group.size),
    )
    plan = partial(plan_decoder, installation, batch.device)
    return lay_out_again(installation.layouts, how, batch, decoder.spans, group, plan)


def lay_out_again(
    layouts: Layouts,
    how: Any,
    batch: Batch,
    spans: Spans | None,
    group: Group,
    plan: Callable[[Segments], PlanChoice],
) -> TextCall:
    """`lay_out`, or what it has returned for a batch like this one, of which `layouts` holds the last few.

    Args:
        how: what decides beside the batch. Layouts of another one are forgotten.
    """
    key = (how, batch.shape, *_marks(batch, spans))
    call = layouts.pop(key, None)
    if call is None:
        call = lay_out(batch, spans, group, plan)
        call = call if spans is not None else replace(call, mask=None)
    others = [old for old in layouts if old[0] == how]
    for old in set(layouts) - set(others[1 - MOST :]):
        del layouts[old]
    layouts[key] = call  # the newest is the last
    return replace(call, mask=batch.mask if spans is None else call.mask, needed={}, tally=Counter())


def _marks(batch: Batch, spans: Spans | None) -> list[bytes | None]:
    """All of a batch that its layout depends on: a bit for each token and kind of mark, or None where there is none."""
    keep = None if batch.mask is None else batch.mask.detach() != 0
    # Labels count where they are predicted from padding.
    alone = None if keep is None or batch.targets is None else ~keep & (batch.targets.detach() != IGNORE)
    mutual = None if spans is None else batch.mutual
    return [None if x is None else _bits(x) for x in (keep, alone, batch.documents, batch.chunks, mutual)]


def _bits(x: Tensor) -> bytes:
    return np.packbits(x.detach().cpu().numpy()).tobytes()
