"""What explain tells of a model that is not wrapped, is wrapped, or cannot be."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from kit import parity, plain_vits, tiny, zoo
from torch import nn

import triton_sp
from triton_sp.explain import Explanation
from triton_sp.testing import relative_error
from triton_sp.wrappers.plain.trial import GATHERED, HEADS

TABLES = {
    # case: (part, kind, layers, heads, a third of them)
    "qwen2_5_vl": [
        ("model.visual.blocks", "vision tower (qwen2_5_vl_vision)", 3, "12", "4"),
        ("model", "fusion (qwen2_5_vl)", None, "", ""),
        ("model.language_model.layers", "decoder (qwen2_5_vl_text)", 2, "12/1", "4"),
    ],
    "llava": [
        ("model.vision_tower.encoder.layers", "vision tower (clip_vision_model)", 3, "12", "4"),
        ("model", "fusion (llava)", None, "", ""),
        ("model.language_model.layers", "decoder (llama)", 2, "12", "4"),
    ],
    "vit": [("layers", "vision tower (vit)", 2, "12", "4")],
    "llama": [("model.layers", "decoder (llama)", 2, "12", "4")],
}


def table(explanation: Explanation) -> list[tuple]:
    assert {row.decision for row in explanation.rows} <= {"sharded", "features routed"}
    return [(row.part, row.kind, row.layers, row.heads, row.heads_per_rank) for row in explanation.rows]


@pytest.mark.parametrize("name", TABLES)
def test_before_wrap(name: str) -> None:
    """It needs no process group, and leaves the model alone."""
    model = zoo.CASES[name].model()
    attributes = [dict(vars(module)) for module in model.modules()]
    explanation = triton_sp.explain(model, ranks=3)
    assert table(explanation) == TABLES[name]
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert str(explanation).startswith(f"{type(model).__name__}: not wrapped; this is what wrap would do on 3 ranks\n")
    assert "proven: the tests compare" in str(explanation) and "all-to-all" in str(explanation)
    assert all(row.why == "proven" for row in explanation.rows if "fusion" not in row.kind)
    assert "attention is computed by: reference" in str(explanation)
    assert all(row.heads_per_rank == "" for row in triton_sp.explain(model).rows)


@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if case.kind == "vlm"])
def test_every_seam_is_known(name: str) -> None:
    """So that parity is parity of what is routed; one that is not known is told, see test_memory.py."""
    rows = triton_sp.explain(zoo.CASES[name].model(), ranks=2).rows
    seams = [row.decision for row in rows if row.kind.startswith("fusion")]
    if name in zoo.TOWER_WHOLE:
        assert zoo.TOWER_WHOLE[name] in [row.decision for row in rows if "vision" in row.part]
    if name == "mllama":  # its images are not put among the text
        assert not seams
    else:
        assert seams == ["features gathered" if name in zoo.FEATURES_GATHERED else "features routed"]


def explained_when_wrapped(name: str, option: str | None = None) -> Explanation:
    config = triton_sp.SPConfig(**{option: True} if option else {})
    return triton_sp.explain(triton_sp.wrap(zoo.CASES[name].model(), config=config))


@pytest.mark.parametrize("name", TABLES)
def test_after_wrap(ranks, name: str) -> None:
    for explanation in ranks.run(explained_when_wrapped, name, ranks=3):
        assert table(explanation) == TABLES[name]
        assert "wrapped, 3 ranks share each batch" in explanation.title


def test_on_one_rank(ranks) -> None:
    (explanation,) = ranks.run(explained_when_wrapped, "vit", ranks=1)
    assert [row.decision for row in explanation.rows] == ["unchanged"]


@pytest.mark.parametrize("option", ["single", "chunked_loss"])
def test_on_one_rank_that_is_wrapped(ranks, option: str) -> None:
    """It runs as on several ranks, and is told so."""
    (explanation,) = ranks.run(explained_when_wrapped, "llava", option, ranks=1)
    assert [row.decision for row in explanation.rows] == ["sharded", "features routed", "sharded"]
    assert {row.why for row in explanation.rows if "fusion" not in row.kind} == {"proven"}


def test_table_is_aligned() -> None:
    title, header, *lines = str(triton_sp.explain(zoo.CASES["llava"].model())).splitlines()
    for line, row in zip(lines, triton_sp.explain(zoo.CASES["llava"].model()).rows, strict=False):
        assert line.index(row.why) == header.index("why")
        assert line.index(row.decision) == header.index("decision")
    assert "Llava" in title


def methods(name: str) -> tuple[Explanation, Explanation]:
    model = triton_sp.wrap(plain_vits.build(name))
    before = triton_sp.explain(model)
    model(plain_vits.pixels(1))
    return before, triton_sp.explain(model)


@pytest.mark.parametrize(("name", "method"), [("sdpa", HEADS), ("matmul", GATHERED)])
def test_plain_modules(ranks, name: str, method: str) -> None:
    for before, after in ranks.run(methods, name, ranks=2):
        assert before.rows[0].why == "how is tried out on the first call"
        assert (after.rows[0].part, after.rows[0].kind, after.rows[0].why) == ("blocks", "blocks (ViT)", method)
        assert ("scaled_dot_product_attention instead" in str(after)) == (method == GATHERED)


# --- a part left whole ---------------------------------------------------------------------------------------------


def clip() -> nn.Module:
    """Two encoders side by side."""
    common = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 12}
    text = hf.CLIPTextConfig(**common, vocab_size=tiny.VOCAB, eos_token_id=tiny.VISION_END)
    vision = tiny.vision_config("CLIPVision")
    config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    return tiny.build("CLIPModel", config, "sdpa", torch.float64)


def clip_parity(gradient: str) -> tuple[Explanation, float, float]:
    batch = {
        "pixel_values": tiny.pixels(3, 3, tiny.GRID * tiny.PATCH, tiny.GRID * tiny.PATCH, dtype=torch.float64),
        "input_ids": torch.tensor(
            [[5, 6, 7, tiny.VISION_END], [9, 8, tiny.VISION_END, 0], [11, 12, 13, tiny.VISION_END]]
        ),
        "return_loss": True,
    }
    reference, model = clip(), triton_sp.wrap(clip(), config=triton_sp.SPConfig(gradient=gradient, plan="heads"))
    losses = [m(**batch).loss for m in (model, reference)]
    for loss in losses:
        loss.backward()
    triton_sp.sync_gradients(model)
    error, _ = parity.gradient_error(parity.gradients(model), parity.gradients(reference))
    return triton_sp.explain(model), relative_error(*losses), error


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_dual_encoder(ranks, gradient: str) -> None:
    """The vision tower is sharded and the text tower, which is no decoder, left whole; training is right."""
    for explanation, loss, error in ranks.run(clip_parity, gradient, ranks=2):
        tower, text = explanation.rows
        assert (tower.part, tower.decision) == ("vision_model.encoder.layers", "sharded")
        assert (text.part, text.decision) == ("text_model.encoder.layers", "left whole")
        assert "neither takes pixels nor is causal" in text.why and "every rank computes all of it" in str(explanation)
        assert loss < 1e-6 and error < 1e-10


def test_refused() -> None:
    model = zoo.CASES["vit"].model()
    model.layers[1].mlp.conv = nn.Conv1d(48, 48, 3, padding=1)
    explanation = triton_sp.explain(model)
    assert [row.decision for row in explanation.rows] == ["refused"]
    assert "layers.1.mlp.conv" in str(explanation) and "Conv1d" in str(explanation)
    assert "wrap raises this error" in str(explanation)

    (row,) = triton_sp.explain(nn.Linear(2, 2)).rows
    assert row.decision == "refused" and "stack of transformer blocks" in row.why


def explained_after_a_batch(name: str, plan: str) -> list[tuple[str, str]]:
    model = triton_sp.wrap(zoo.CASES[name].model(), config=triton_sp.SPConfig(plan=plan))
    assert all(row.last_batch == "" for row in triton_sp.explain(model).rows)
    model(**zoo.CASES[name].batch("plain"))
    explanation = triton_sp.explain(model)
    assert all(f"last batch, {row.part}: {row.last_batch}" in str(explanation) for row in explanation.rows)
    return [(row.part, row.last_batch) for row in explanation.rows]


def test_the_plan_of_the_last_batch(ranks) -> None:
    """Qwen2.5-VL cut where windows end: windowed layers exchange nothing, the full one heads."""
    (_, tower), (_, fusion), (_, decoder) = ranks.run(explained_after_a_batch, "qwen2_5_vl", "segments", ranks=2)[1]
    assert tower.startswith("plan segments, ") and "no exchange; heads 6-11; as SPConfig.plan says" in tower
    assert fusion == "rows of get_image_features 19 + 16"
    assert "heads 6-11" in decoder
    whole = ranks.run(explained_after_a_batch, "llama", "heads", ranks=2)[0]
    assert whole == [("model.layers", "plan heads, 19 + 18 tokens, heads 0-5; as SPConfig.plan says")]
