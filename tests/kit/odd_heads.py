"""Models whose head counts no group of 2, 3 or 4 ranks divides, or whose query groups straddle ranks."""

from __future__ import annotations

from pathlib import Path

from kit import zoo
from kit.parity import Parity, Plan, run

MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
TEXT = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 28 * 8}

CASES = {
    case.name: case
    for case in (
        zoo.vision_case("vit_25", "ViT", num_attention_heads=25, hidden_size=100),
        zoo.text_case("llama_28_4", "Llama", **TEXT),
        zoo.text_case("qwen2_28_4", "Qwen2", layers=3, sliding_window=7, **MIXED, **TEXT),
        zoo.text_case("llama_5_1", "Llama", num_attention_heads=5, num_key_value_heads=1, hidden_size=40),
    )
}


def run_all(name: str, plans: list[Plan], references: dict[str, Path]) -> list[Parity]:
    return [run(CASES[name], plan, references[plan.batch]) for plan in plans]
