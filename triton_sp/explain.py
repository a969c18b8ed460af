"""explain: what a model is made of, and what wrap does, or would do, with each part and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from triton_sp import models
from triton_sp.errors import SPError
from triton_sp.wrappers.install import installation_of
from triton_sp.wrappers.opaque import method_of


@dataclass(frozen=True)
class Row:
    """One part of a model."""

    part: str
    kind: str
    layers: int
    heads: str
    decision: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: prints as a table, and `rows` holds the same for a program."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        columns = ("part", "kind", "layers", "heads", "decision", "why")
        cells = [columns] + [tuple(str(getattr(row, name)) for name in columns) for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        return "\n".join([self.title, *lines])


def explain(model: nn.Module) -> Explanation:
    """Say what was found in a model, what is sharded how, what is refused or left whole, and why. Runs nothing.

    Args:
        model: wrapped or not; of a model that is not, it says what wrap would do.

    >>> from transformers import CLIPVisionConfig, CLIPVisionModel
    >>> tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    >>> row = explain(CLIPVisionModel(tiny)).rows[0]
    >>> row.part, row.kind, row.layers, row.heads, row.decision
    ('encoder.layers', 'vision tower (clip_vision_model)', 2, '2', 'would be sharded')
    """
    installation = installation_of(model)
    try:
        anatomy = installation.anatomy if installation else models.find(model)
    except SPError as error:
        return Explanation(f"{type(model).__name__}: refused", (Row("", "", 0, "", "refused", str(error)),))
    ranks = installation.group.size if installation else None
    state = f"wrapped on {ranks} ranks" if installation else "not wrapped"
    rows = [_row(stack, "vision tower", ranks) for stack in anatomy.towers]
    if anatomy.decoder:
        rows.append(_row(anatomy.decoder, "decoder", ranks))
    rows += [Row(name, "other", 0, "", "left whole", reason) for name, reason in anatomy.whole]
    return Explanation(f"{type(model).__name__}: {state}", tuple(rows))


def _heads(stack: models.Stack) -> tuple[int, int] | None:
    """(query, key/value) heads as the configuration has them; what counts at run time are the shapes."""
    config = getattr(stack.attention[0], "config", None) if stack.attention else None
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    return (heads, getattr(config, "num_key_value_heads", None) or heads) if heads else None


def _row(stack: models.Stack, kind: str, ranks: int | None) -> Row:
    heads = _heads(stack)
    shown = "" if heads is None else str(heads[0]) if heads[0] == heads[1] else f"{heads[0]}/{heads[1]}"
    decision = "sharded" if ranks else "would be sharded"
    why = "known family" if stack.known else "attention goes through transformers' interface; other layers token-wise"
    if not stack.door:
        why = "attention of its own: " + ", ".join(
            sorted({method_of(block) or "decided on the first call" for block in stack.blocks})
        )
    if ranks == 1:
        decision, why = "unchanged", "one rank"
    if stack.refusal is not None:
        decision, why = "refused", str(stack.refusal)
    return Row(stack.name, f"{kind} ({stack.family})", len(stack.blocks), shown, decision, why)
