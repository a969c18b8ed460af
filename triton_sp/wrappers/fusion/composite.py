"""The composite model around a tower and a decoder: its forward runs on this rank's tokens.

It embeds this rank's ids, calls its own methods that make features, of which this rank gets the rows that its
placeholders need (features.py), and puts them in their places by its own code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from triton_sp.anatomy.families import first_position, first_positions
from triton_sp.anatomy.parts import FeatureMethod, Fusion
from triton_sp.plan.shards import Shards
from triton_sp.wrappers.decoders.decoder import localise_text
from triton_sp.wrappers.fusion.features import change_rows, check_count, make_features
from triton_sp.wrappers.inputs.layout import TextCall
from triton_sp.wrappers.install import Installation, Override
from triton_sp.wrappers.scope import active, current, refuse_lost_scope


def install(fusion: Fusion, installation: Installation) -> None:
    """Override the forward of the composite and the methods that make its features."""
    installation.override(fusion.module, _run_composite)
    for features in fusion.features:
        installation.override(fusion.module, partial(make_features, features), features.method)


def _run_composite(override: Override, *args: Any, **kwargs: Any) -> Any:
    """The composite's forward on this rank's part of the tokens."""
    call = current(TextCall)
    if call is None:
        refuse_lost_scope(override)
    if call is None or not call.routes:
        return override.original(*args, **kwargs)
    arguments, fusion = override.bind(args, kwargs), override.installation.anatomy.fusion
    assert fusion is not None
    for features in fusion.features:
        if features.granularity == "patches" and features.grid is not None:  # `cut_patches` works with numbers
            arguments[features.grid] = _on_host(arguments.get(features.grid))
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = positions_of_all(override, arguments, call)
    given = arguments.get("mm_encoder_outputs")
    if isinstance(given, Mapping):
        arguments["mm_encoder_outputs"] = _part_of_outputs(given, call, override.installation)
    call = localise_text(arguments, call, override.installation)
    if "position_ids" not in override.__signature__.parameters:
        del arguments["position_ids"]  # it would hand them on to whatever takes keywords (InstructBLIP's Q-Former)
    with active(call):
        return override.original(**arguments)


def positions_of_all(override: Override, arguments: dict[str, Any], call: TextCall) -> Tensor:
    """The positions of all tokens, as the composite or its decoder would have made them.

    The composite's method reads ids and grids one number after another, image by image. On a GPU each would be a wait
    for the device (Qwen2.5-VL: 5 an image), so it gets them on the CPU.
    """
    composite: Any = override.module
    if hasattr(composite, "compute_3d_position_ids"):
        method = composite.compute_3d_position_ids
        given = {name: arguments.get(name) for name in inspect.signature(method).parameters}
        positions = method(**{name: x if name == "inputs_embeds" else _on_host(x) for name, x in given.items()})
        if positions is not None:
            return positions.to(call.index.device, non_blocking=True)
    decoder = override.installation.anatomy.decoder
    assert decoder is not None
    mask, length = arguments.get("attention_mask"), call.shape[1]
    return first_positions(decoder, None, mask, length, call.index.device) + first_position(composite)


def _on_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _part_of_outputs(given: Mapping[str, Any], call: TextCall, installation: Installation) -> dict[str, Any]:
    """Features that the caller has made: this rank's rows of them."""
    fusion, group = installation.anatomy.fusion, installation.group
    assert fusion is not None
    part = dict(given)
    for features in fusion.features:
        modality = features.method.split("_")[1]
        if part.get(modality) is None:
            continue
        needed = call.needed[features.method]
        own = needed.range(group.rank)

        def pick(rows: Tensor, features: FeatureMethod = features, needed: Shards = needed, own: range = own) -> Tensor:
            check_count(features, len(rows), needed)
            return rows[own.start : own.stop]

        part[modality] = change_rows(copy.copy(part[modality]), pick)
    return part
