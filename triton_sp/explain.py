"""explain: what a model is made of, what `wrap` does or would do with each part, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from triton_sp.anatomy.families import layer_config
from triton_sp.anatomy.find import find_parts
from triton_sp.anatomy.parts import Anatomy, Fusion, Stack, device_of
from triton_sp.errors import InputError, SPError, require
from triton_sp.forecast.job import Job
from triton_sp.forecast.step import Forecast, forecast_batch
from triton_sp.ops.dispatch import implementation
from triton_sp.wrappers.generation import describe_prefill
from triton_sp.wrappers.inputs.described import describe_messages
from triton_sp.wrappers.install import Installation, installation_of
from triton_sp.wrappers.layers.rotation import describe_rotations
from triton_sp.wrappers.layers.tiled_mlp import mlps
from triton_sp.wrappers.losses.head import loss_implementation
from triton_sp.wrappers.plain.opaque import method_of
from triton_sp.wrappers.plain.trial import GATHERED
from triton_sp.wrappers.proof.verification import describe_verification

FEATURES_ROUTED, FEATURES_GATHERED = "features routed", "features gathered"

ATTENTION_GATHERED = "sharded, attention gathered"
PROVEN, BY_STRUCTURE = "proven", "accepted by structure"
BY_IMAGES, LEFT_WHOLE = "by images", "left whole"

LEGEND = {
    PROVEN: "the tests compare a model of this kind with one process: its loss, and the gradient of every parameter.",
    BY_STRUCTURE: "its attention can be exchanged, and every other layer is known to work token by token; no test "
    "compares this kind of model with one process. Do so on a small one before a long run.",
    "sharded": "each rank runs these layers on its part of the tokens. An attention layer sends q, k and v in one "
    "all-to-all and receives the results of its tokens in another. There is none if each segment (image, window, "
    "document) lies whole on one rank. A vision tower alone ends with one gather.",
    ATTENTION_GATHERED: "each rank runs the token-wise layers on its part of the tokens; the layers that are named "
    "get the hidden states of all tokens, and every rank computes all of them.",
    FEATURES_ROUTED: "each rank embeds its part of the text, makes the features of its part of the pixels, and is sent "
    "the features that its placeholders need. No tensor on a rank is as long as the batch.",
    FEATURES_GATHERED: "features and embeddings are whole on every rank; the decoder takes its part of them.",
    GATHERED: "this attention multiplies its matrices itself, so each rank gathers its input, computes all of it and "
    "keeps its own tokens. Calling torch.nn.functional.scaled_dot_product_attention instead would divide the work.",
    BY_IMAGES: "each rank runs it on images of its own, and on no other rank's. An image is not divided, so of fewer "
    "images than ranks some ranks have none, and repeat another's to no effect.",
    LEFT_WHOLE: "every rank computes all of it, as without triton_sp.",
    "refused": "wrap raises this error instead of computing something else.",
}


@dataclass(frozen=True)
class Row:
    """One part of a model.

    Attributes:
        part: the name of the part in the model, usually that of a list of blocks.
        kind: what it is, and its family.
        layers: how many blocks it has.
        heads: the number of query heads, and after "/" that of key/value heads if these are fewer.
        heads_per_rank: the mean number of query heads that a rank attends with.
        decision: "sharded", "by images", "left whole", "refused", or "unchanged" on one rank; for the fusion of vision
            and text "features routed" or "features gathered".
        why: the reason.
        last_batch: empty until the wrapped model has run. Then the plan of its last batch (or of the one given), the
            tokens of each rank, how the layers attended on this rank (in two ways if windows and whole images
            alternate), and why this plan.
    """

    part: str
    kind: str
    layers: int | None
    heads: str
    heads_per_rank: str
    decision: str
    why: str
    last_batch: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns. It prints as a table.

    Attributes:
        title: the class of the model, and whether it is wrapped.
        rows: the lines of the table, for programs.
        attention: what computes attention on the model's device, see `ops.dispatch.implementation`.
        loss: what computes the loss of a training step; empty if the model is not wrapped.
        prefill: how `generate` runs a prompt; empty if the model is not wrapped, or does not generate.
        verified: how often `SPConfig(verify=...)` verifies a layer, and the last result.
        memory: what `SPConfig(tiled_mlp, offload)` do; empty if they are not asked for.
        needs: what a step on the batch that was given would need; empty if none was.
        rotations: what rotates q and k by their positions; empty if the model is not wrapped, or rotates none.
        messages: by what ranks compare their batches; empty if the model is not wrapped.
    """

    title: str
    rows: tuple[Row, ...]
    attention: str
    loss: str = ""
    prefill: str = ""
    verified: str = ""
    memory: str = ""
    needs: str = ""
    rotations: str = ""
    messages: str = ""

    @property
    def _words(self) -> set[str]:
        """What the table says that the legend may explain."""
        return {word for row in self.rows for word in (row.decision, *row.why.split("; "))}

    def __str__(self) -> str:
        told = [f"{word}: {text}" for word, text in LEGEND.items() if word in self._words]
        which = "this batch" if self.needs else "last batch"
        plans = [f"{which}, {row.part}: {row.last_batch}" for row in self.rows if row.last_batch]
        computed = {
            "attention is computed by": self.attention,
            "the loss of a training step is computed by": self.loss,
            "q and k are rotated by": self.rotations,
            "the prompt of generate is run by": self.prefill,
            "ranks compare their batches by": self.messages,
            "attention is verified in": self.verified,
            "memory is saved by": self.memory,
            "a step needs": self.needs,
        }
        said = [f"{what}: {how}" for what, how in computed.items() if how]
        return "\n".join([self.title, *self._table(), *plans, *said, *told])

    def _table(self) -> list[str]:
        """The rows as lines of text, columns one under another."""
        columns = [field.name for field in fields(Row) if field.name != "last_batch"]
        cells = [[column.replace("_", " ") for column in columns]]
        cells += [["" if (cell := getattr(row, name)) is None else str(cell) for name in columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]


def explain(model: nn.Module, *, ranks: int | None = None, **batch: Any) -> Explanation:
    """Say what was found in a model, what is sharded, refused or left whole, and why. The model is not run.

    For a wrapped model that has run, it also says which plan the last batch had. For one that is not wrapped, and a
    batch, it says which plan a step of training on the batch would have, and what each rank would hold and send, as
    `triton-sp plan` does (with plain data parallelism as the engine, and the checkpointing that is switched on).

    Args:
        model: a wrapped model, or one that is not; then it says what `wrap` would do.
        ranks: the group size to assume for a model that is not wrapped.
        batch: the arguments of its forward, with labels, before torch.distributed is initialised.

    Raises:
        InputError: a batch for a wrapped model, or without a group size.

    >>> from transformers import CLIPVisionConfig, CLIPVisionModel
    >>> tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    >>> row = explain(CLIPVisionModel(tiny), ranks=2).rows[0]
    >>> row.part, row.kind, row.layers, row.heads, row.heads_per_rank, row.decision
    ('encoder.layers', 'vision tower (clip_vision_model)', 2, '2', '1', 'sharded')
    """
    if not batch:
        return _explain(model, ranks)
    wrapped = installation_of(model) is not None
    require(not wrapped, InputError, "model", "one that is not wrapped", "a wrapped one", "triton_sp.unwrap(model)")
    require(ranks, InputError, "ranks", "the size of a group", "none", "explain(model, ranks=4, **batch)")
    row, planned = forecast_batch(model, batch, Job(gpus=ranks or 1), ranks or 1, None)
    found = _explain(model, ranks)
    rows = tuple(replace(row, last_batch=_last_batch(row.part, planned)) for row in found.rows)
    return replace(found, rows=rows, needs=_needs(row))


def _needs(row: Forecast) -> str:
    peak = max(row.forward_peak, row.backward_peak)
    return (
        f"rank {row.rank}: {row.own_tokens:,} of {row.tokens:,} tokens; {row.activations / 1e9:.3g} GB kept for the "
        f"backward, {peak / 1e9:.3g} GB at the peak, beside {row.parameters / 1e9:.3g} GB of parameters and what the "
        f"engine adds; {row.sent_in_step / 1e9:.3g} GB sent; about {row.seconds:.3g} s by the cost model's link"
    )


def _explain(model: nn.Module, ranks: int | None) -> Explanation:
    installation = installation_of(model)
    if installation is not None:
        ranks = installation.group.size
        state, unchanged = f"wrapped, {ranks} rank{'s' * (ranks > 1)} share each batch", installation.idle
    else:
        state, unchanged = (
            "not wrapped; this is what wrap would do" + (f" on {ranks} ranks" if ranks else ""),
            ranks == 1,
        )
    title = f"{type(model).__name__}: {state}"
    try:
        attention = implementation(device_of(model))
    except SPError as error:
        attention = f"nothing on this machine: {error}"
    loss = "" if installation is None else loss_implementation(installation)
    prefill = describe_prefill(installation)
    verified = describe_verification(installation)
    try:
        anatomy = installation.anatomy if installation else find_parts(model)
    except SPError as error:
        return Explanation(title, (Row("", "", None, "", "", "refused", str(error)),), attention)
    rows = [
        _row(stack, "vision tower" if stack.by_interface else "blocks", ranks, unchanged) for stack in anatomy.towers
    ]
    if anatomy.fusion and not unchanged:
        rows.append(_fusion_row(anatomy.fusion))
    if anatomy.decoder:
        rows.append(_row(anatomy.decoder, "decoder", ranks, unchanged))
    if installation is not None:
        rows = [replace(row, last_batch=_last_batch(row.part, installation)) for row in rows]
    rows += _rows_beside(anatomy, installation, unchanged)
    return Explanation(
        title,
        tuple(rows),
        attention,
        *(loss, prefill, verified, _memory(installation)),
        rotations=describe_rotations(anatomy),
        messages=describe_messages(installation),
    )


def _memory(installation: Installation | None) -> str:
    if installation is None:
        return ""
    config, said = installation.config, []
    if config.tiled_mlp:
        said.append(f"{len(mlps(installation.anatomy))} MLPs that work on {config.tiled_mlp} tokens at a time")
    if config.offload:
        said.append(f"{installation.offloaded:,} bytes of the last call that went to CPU memory")
    return ", ".join(said)


def _fusion_row(fusion: Fusion) -> Row:
    config: Any = fusion.module.config
    name, kind = fusion.name or type(fusion.module).__name__, f"fusion ({config.model_type})"
    if not fusion.features:
        return Row(name, kind, None, "", "", FEATURES_GATHERED, fusion.why)
    whole = [features.method for features in fusion.features if features.granularity == "whole"]
    why = "; ".join([PROVEN if fusion.proven else BY_STRUCTURE, *(f"{method} runs on every rank" for method in whole)])
    return Row(name, kind, None, "", "", FEATURES_ROUTED, why)


def _rows_beside(anatomy: Anatomy, installation: Installation | None, unchanged: bool) -> list[Row]:
    """What is in no stack that is sharded: it runs on a rank's own images where only such features are made of it,
    unless those of the last batch were made on every rank."""
    makers = anatomy.fusion.makers if anatomy.fusion is not None and not unchanged else ()
    last_whole = {} if installation is None else installation.last_whole
    made_whole = next((f"{method} of the last batch: {why}" for method, why in last_whole.items()), "")
    parts = [(name, "other", reason) for name, reason in anatomy.unsharded]
    if not parts and not anatomy.towers:
        parts = [(name, "vision", "") for name in makers]
    rows = list[Row]()
    for name, kind, reason in parts:
        by_images = any(f"{name}.".startswith(f"{maker}.") for maker in makers)
        why = made_whole if by_images else ""
        decision = BY_IMAGES if by_images and not why else LEFT_WHOLE
        rows.append(Row(name, kind, None, "", "", decision, "; ".join(filter(None, (reason, why)))))
    return rows


def _last_batch(part: str, installation: Installation) -> str:
    call, fusion = installation.last_calls.get(part), installation.anatomy.fusion
    if fusion is not None and part == (fusion.name or type(fusion.module).__name__):
        why = {name: f" (all made on every rank: {why})" for name, why in installation.last_whole.items()}
        rows = (
            f"{name} {' + '.join(map(str, shards.sizes))}{why.get(name, '')}"
            for name, shards in installation.last_rows.items()
        )
        return "rows of " + ", ".join(rows) if installation.last_rows else ""
    if call is None:
        return ""
    tokens = " + ".join(map(str, call.choice.shards.sizes))
    who = call.choice.attention
    computed = f"; attention {', '.join(sorted(who.ran))}" if who is not None else ""
    return f"plan {call.choice.plan}, {tokens} tokens, {'; '.join(call.attended)}{computed}; {call.choice.why}"


def _heads(stack: Stack) -> tuple[int, int] | None:
    """The numbers of (query, key/value) heads in the configuration; at run time the shapes of tensors decide."""
    attention: Any = stack.attention[0] if stack.attention else None
    config = attention if attention is None else layer_config(attention) or attention
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    return (heads, getattr(config, "num_key_value_heads", None) or heads) if isinstance(heads, int) else None


def _row(stack: Stack, kind: str, ranks: int | None, unchanged: bool) -> Row:
    heads = _heads(stack)
    shown = "" if heads is None else str(heads[0]) if heads[0] == heads[1] else f"{heads[0]}/{heads[1]}"
    share = f"{heads[0] / ranks:.3g}" if heads and ranks else ""
    decision, why = (
        "sharded",
        PROVEN if stack.proven else BY_STRUCTURE,
    )
    if not stack.by_interface:
        methods = {method_of(block) for block in stack.blocks}
        why = ", ".join(sorted(method or "how is tried out on the first call" for method in methods))
    if stack.recurrent:
        why += f"; {len(stack.recurrent)} recurrent layers hand on states or trade tokens for heads"
    if stack.gathered:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in stack.gathered}))
        decision, why = ATTENTION_GATHERED, f"{BY_STRUCTURE}; {kinds}: {stack.why_gathered}"
    if unchanged:
        decision, why = "unchanged", "one rank"
    if stack.refusal is not None:
        decision, why = "refused", str(stack.refusal)
    return Row(stack.name, f"{kind} ({stack.family})", len(stack.blocks), shown, share, decision, why)
