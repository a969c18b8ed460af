"""Tiny random-weight models and batches for the parity suite: the classes of the installed transformers, built from
configurations in code. Plain functions; a process that imports this builds the same weights as every other.

Sizes are chosen to be awkward. Patch counts, and the number of real tokens of a text batch, leave remainder 1, 5, 7 or
11 by 12, so that no group of 2, 3 or 4 ranks divides them. Head counts are 12, which they all divide.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

Batch = dict[str, Tensor]


class Missing(dict[str, Any]):
    """A configuration that the installed version of transformers doesn't have. Its cases are left out."""

    def to_dict(self) -> Missing:
        return self

    to_diff_dict = to_dict


class _Installed:
    """transformers, with something in the place of configurations that an older version doesn't have or take."""

    def __getattr__(self, name: str) -> Any:
        newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
        if newest or not name.endswith("Config"):
            return getattr(transformers, name)
        return partial(_configure, getattr(transformers, name, Missing))


def _configure(kind: Any, **options: Any) -> Any:
    if any(isinstance(value, Missing) for value in options.values()):
        return Missing()
    try:
        return kind(**options)
    except (StrictDataclassError, ValueError):  # of 5.x, of 4.57
        return Missing()


hf = _Installed()

PAD, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_TEXT, VOCAB = 0, 1, 2, 3, 4, 5, 89
HEADS = 12
MERGE = 2  # Qwen merges 2x2 patches into one token
GRID, PATCH = 6, 4  # patches a side of the fixed-size towers, pixels a side of a patch


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        unused: prefixes of the parameters that get no gradient from any batch, because the forward does not use what
            they compute. On "no_images" the vision tower and the projector get none either. The biases of keys without
            rotary positions have a gradient that is mathematically zero: compare it with others' scale, not its own.
        ranks: the group sizes that it is made for.
        suite: those of the test suite; the rest run in `make all-plans`.
        dtype: the widest that the model runs in.
        documents_alone: the model itself lets packed documents see one another, so its reference runs one at a time.
        widened: what the model does in float32 is done in float64, in the reference and on the ranks.
    """

    name: str
    kind: str  # "vlm", "vision" or "text"
    build: Callable[[torch.dtype], nn.Module]
    batches: Mapping[str, Callable[[torch.dtype], Batch]]
    unused: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1, 2, 3, 4)
    suite: tuple[int, ...] = (2, 3, 4)
    dtype: torch.dtype = torch.float64
    documents_alone: bool = False
    widened: bool = False

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with its weights, the same in every process; in the widest dtype, or the one asked for."""
        return self.build(dtype or self.dtype)

    def batch(self, name: str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """A batch by its name, or the first."""
        return self.batches[name or next(iter(self.batches))](dtype or self.dtype)


def build(model: str, config: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in every process. Noise on every parameter, so that zeros (CLS tokens, biases) and ones (norms)
    have informative gradients too."""
    torch.manual_seed(0)
    built = getattr(hf, model)._from_config(copy.deepcopy(config), attn_implementation=attention)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built.to(dtype).train()


def loss_of(output: Any) -> Tensor:
    """The model's loss, or for a vision tower alone a fixed random projection of all that it returns."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    generator = torch.Generator().manual_seed(1)
    parts = [output.last_hidden_state, output.pooler_output]
    return sum((x * torch.randn(x.shape, generator=generator).to(x)).mean() for x in parts if x is not None)


# --- text --------------------------------------------------------------------------------------------------------


def text_row(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCAB, (length,), generator=generator).tolist()


def collate(rows: list[list[int]], pad: str | None) -> Batch:
    """Rows of token ids to a batch with labels; `pad` is "left", "right", or None for one row without a mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if pad == "left" else slice(len(row))
        ids[i, own] = torch.tensor(row)
        mask[i, own] = 1
    unlearned = (mask == 0) | (ids == IMAGE) | (ids == VIDEO)
    batch = {"input_ids": ids, "labels": ids.masked_fill(unlearned, -100)}
    return batch if pad is None else batch | {"attention_mask": mask}


def uneven_positions(mask: Tensor) -> Tensor:
    """Explicit position ids that nothing would have guessed: steps of 1 and 2, from each row's first real token."""
    index = (mask.cumsum(-1) - 1).clamp(min=0)
    return index + index // 3


def text_batch(name: str, dtype: torch.dtype, padding_learns: bool = True) -> Batch:
    """`dtype` is for the pixels of other families. `padding_learns`: the last padding in front of a row predicts its
    first token, as labels = input_ids have it."""
    lengths = {
        "plain": [37],
        "left_pad": [18, 31, 6],
        "right_pad": [29, 3, 23],
        "position_ids": [17, 32],
        "packed": [1, 22, 9, 5],
    }[name]
    generator = torch.Generator().manual_seed(len(name))
    rows = [text_row(length, generator) for length in lengths]
    if name == "packed":
        batch = collate([[token for row in rows for token in row]], None)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return batch | {"position_ids": positions[None]}
    batch = collate(rows, {"plain": None, "right_pad": "right"}.get(name, "left"))
    if name == "position_ids":
        batch["position_ids"] = uneven_positions(batch["attention_mask"])
    if not padding_learns and "attention_mask" in batch:
        batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    return batch


def text_config(name: str, head_dim: int = 8, kv_heads: int = HEADS, layers: int = 2, **options: Any) -> Any:
    # use_cache=False: with a cache at hand transformers does not look for packed documents.
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * head_dim,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": VISION_START,
        "eos_token_id": VISION_END,
        "use_cache": False,
    }
    if name != "GPTNeoX":
        common |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    return getattr(hf, f"{name}Config")(**(common | options))


def text_case(name: str, family: str, attention: str = "sdpa", ranks: tuple[int, ...] = (1, 2, 3, 4), **options: Any):
    names = ("plain", "left_pad", "right_pad", "position_ids", "packed")
    # Eager attention fills masks with the least float64, which is -inf in its softmax, which is in float32. Gemma's
    # norms round their weight to float32, so its gradient is a sum of float32 numbers.
    dtype = torch.float32 if attention == "eager" or family == "Gemma" else torch.float64
    config = text_config(f"{family}Text" if hasattr(transformers, f"{family}TextConfig") else family, **options)
    recipe = partial(build, f"{family}ForCausalLM", config, attention)
    # Where a row has no key, eager attention averages all tokens of the row; sdpa and flash attention give 0.
    batches = {batch: partial(text_batch, batch, padding_learns=attention != "eager") for batch in names}
    return Case(name, "text", recipe, batches, (), ranks, dtype=dtype)


# --- vision alone ------------------------------------------------------------------------------------------------


def vision_config(name: str, grid: int = GRID, layers: int = 2, **options: Any) -> Any:
    common = {
        "hidden_size": HEADS * 4,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
    }
    if name != "Dinov2":
        common["intermediate_size"] = 64
    return getattr(hf, f"{name}Config")(**(common | options))


def pixels(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vision_case(name: str, family: str, grid: int = GRID, unused: tuple[str, ...] = (), **options: Any) -> Case:
    side = grid * PATCH

    def batch(images: int, dtype: torch.dtype) -> Batch:
        return {"pixel_values": pixels(images, 3, side, side, dtype=dtype)}

    recipe = partial(build, f"{family}Model", vision_config(family, grid, **options), "sdpa")
    return Case(name, "vision", recipe, {"plain": partial(batch, 1), "many_images": partial(batch, 5)}, unused)


# --- vision and language -----------------------------------------------------------------------------------------

# Rows of a batch: lengths of text, and visuals, which are taken from the family's in order.
LAYOUTS: dict[str, list[list[int | str]]] = {
    "plain": [[5, "image", 7]],
    "left_pad": [[3, "image", 4, "image", 2, "image", 3], [9], [1, "image", 5, "image", 6]],
    "right_pad": [[12], [6, "image", 2, "image", 3], [2, "image", 1, "image", 1, "image", 5]],
    "position_ids": [[4, "image", 3], [2, "image", 8, "image", 1, "image", 2, "image", 4]],
    "no_images": [[11], [26]],
    "video": [[4, "video", 3], [5]],
    "image_and_video": [[4, "video", 3, "image", 6], [2, "image", 5, "image", 7, "image", 1, "image", 2]],
}


@dataclass(frozen=True)
class Visuals:
    """How a family takes images or videos: `spans[i]` are the placeholder runs of the i-th, `inputs(n, dtype)` the
    tensors of the first n."""

    spans: list[list[int]]
    inputs: Callable[[int, torch.dtype], Batch]


def vlm_batch(name: str, families: Mapping[str, Visuals], qwen: bool, dtype: torch.dtype) -> Batch:
    generator, token = torch.Generator().manual_seed(len(name)), {"image": IMAGE, "video": VIDEO}
    seen = dict.fromkeys(families, 0)
    rows: list[list[int]] = []
    for layout in LAYOUTS[name]:
        row: list[int] = []
        for item in layout:
            if isinstance(item, int):
                row += text_row(item, generator)
                continue
            for span in families[item].spans[seen[item]]:
                row += [VISION_START, *[token[item]] * span, VISION_END]
            seen[item] += 1
        rows.append(row)
    rows[0] += text_row((1 - sum(map(len, rows))) % 12, generator)

    pad = None if len(rows) == 1 else "right" if name == "right_pad" else "left"
    batch = collate(rows, pad)
    for kind, count in seen.items():
        if count:
            batch |= families[kind].inputs(count, dtype)
    if qwen:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int() + 2 * (batch["input_ids"] == VIDEO).int()
    if name == "position_ids":
        positions = uneven_positions(batch["attention_mask"])
        batch["position_ids"] = torch.stack([positions, positions // 2, positions // 3]) if qwen else positions
    return batch


def vlm_case(
    name: str, model: str, parts: tuple[Any, Any, dict[str, Visuals]], unused=(), attention="sdpa", **options: Any
) -> Case:
    vision, text, families = parts
    names = [batch for batch in LAYOUTS if "video" not in batch or (batch != "video" and "video" in families)]
    batches = {batch: partial(vlm_batch, batch, families, name.startswith(("qwen", "glm"))) for batch in names}
    config = getattr(hf, f"{model}Config")(vision_config=vision, text_config=text, image_token_id=IMAGE, **options)
    return Case(name, "vlm", partial(build, f"{model}ForConditionalGeneration", config, attention), batches, unused)


def qwen_visuals(frame_spans: bool = False) -> dict[str, Visuals]:
    """Qwen's processors cut pictures into patches; grids are (frames, height, width) in patches. `frame_spans`: each
    frame of a video has its own placeholders between timestamps, as Qwen3-VL wants them."""
    grids = {"image": [(1, 10, 14), (1, 4, 6), (1, 4, 12), (1, 6, 6), (1, 2, 10)], "video": [(5, 10, 2)]}

    def inputs(kind: str, count: int, dtype: torch.dtype) -> Batch:
        grid = torch.tensor(grids[kind][:count])
        patches = pixels(int(grid.prod(-1).sum()), 3 * 2 * PATCH**2, dtype=dtype, seed=len(kind) + count)
        return {"pixel_values" if kind == "image" else "pixel_values_videos": patches, f"{kind}_grid_thw": grid}

    def spans(frames: int, height: int, width: int) -> list[int]:
        frame = height * width // MERGE**2
        return [frame] * frames if frame_spans else [frame * frames]

    return {kind: Visuals([spans(*grid) for grid in sizes], partial(inputs, kind)) for kind, sizes in grids.items()}


def tile_visuals(tiles: list[int], features: int) -> dict[str, Visuals]:
    """LLaVA and InternVL: images of a fixed size, `tiles[i]` of them for the i-th picture."""

    def inputs(count: int, dtype: torch.dtype) -> Batch:
        side = GRID * PATCH
        return {"pixel_values": pixels(sum(tiles[:count]), 3, side, side, dtype=dtype, seed=count)}

    return {"image": Visuals([[number * features] for number in tiles], inputs)}


ONEVISION_GRID = 5
ONEVISION_SIDE = ONEVISION_GRID * PATCH
ONEVISION_PINPOINTS = [[ONEVISION_SIDE * rows, ONEVISION_SIDE * columns] for rows in (1, 2) for columns in (1, 2, 3)]


def onevision_visuals() -> dict[str, Visuals]:
    """LLaVA-OneVision: an overview tile and a grid of tiles that fits the picture's (height, width) best; features of
    the padding are dropped and a newline feature ends each row."""
    sizes, frames = [(33, 40), (20, 41), (47, 21), (18, 19), (44, 39)], 5
    shapes = [get_anyres_image_grid_shape(size, ONEVISION_PINPOINTS, ONEVISION_SIDE) for size in sizes]
    tiles = [1 + rows * columns for rows, columns in shapes]

    def features(size: tuple[int, int], rows: int, columns: int) -> int:
        height, width = unpad_image(torch.empty(1, rows * ONEVISION_GRID, columns * ONEVISION_GRID), size).shape[1:]
        return ONEVISION_GRID**2 + height * (width + 1)

    def images(count: int, dtype: torch.dtype) -> Batch:
        side, most = ONEVISION_SIDE, max(tiles[:count])
        stacked = pixels(count, most, 3, side, side, dtype=dtype, seed=count)
        for picture, number in zip(stacked, tiles[:count], strict=True):
            picture[number:] = 0
        return {"pixel_values": stacked, "image_sizes": torch.tensor(sizes[:count])}

    def videos(count: int, dtype: torch.dtype) -> Batch:
        side = ONEVISION_SIDE
        return {"pixel_values_videos": pixels(count, frames, 3, side, side, dtype=dtype, seed=count)}

    pooled = (ONEVISION_GRID + 1) // 2
    return {
        "image": Visuals([[features(size, *shape)] for size, shape in zip(sizes, shapes, strict=True)], images),
        "video": Visuals([[frames * pooled**2 + 1]], videos),
    }


# --- the cases ---------------------------------------------------------------------------------------------------

WIDTH = HEADS * 8  # of Qwen's towers and of the text models
ROPE = "rope_parameters" if hasattr(hf.Qwen2VLTextConfig(), "rope_parameters") else "rope_scaling"  # before 5
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 4.0}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}


def qwen_cases() -> list[Case]:
    common = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH}
    qwen2 = common | {"depth": 2, "embed_dim": WIDTH, "mlp_ratio": 1}
    wide = common | {"depth": 3, "intermediate_size": 80, "out_hidden_size": WIDTH}
    # Windows of 2x2 merged tokens, ragged at the edges; the middle block sees whole images.
    qwen2_5 = wide | {"window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1]}
    qwen3 = wide | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text2 = text_config("Qwen2VLText", **{ROPE: MROPE})
    text2_5 = text_config("Qwen2_5_VLText", kv_heads=1, **{ROPE: MROPE})
    interleaved = {ROPE: MROPE | {"mrope_interleaved": True}}
    text3 = text_config("Qwen3VLText", layers=3, **interleaved)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    text3_moe = text_config("Qwen3VLMoeText", kv_heads=4, **interleaved, **experts)
    ids = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    # The experts' grouped product has no float64.
    moe = vlm_case("qwen3_vl_moe", "Qwen3VLMoe", (qwen3, text3_moe.to_dict(), qwen_visuals(frame_spans=True)), **ids)
    return [
        replace(moe, dtype=torch.float32),
        vlm_case("qwen2_vl", "Qwen2VL", (qwen2, text2.to_dict(), qwen_visuals()), **ids),
        vlm_case("qwen2_5_vl", "Qwen2_5_VL", (qwen2_5, text2_5.to_dict(), qwen_visuals()), **ids),
        vlm_case("qwen3_vl", "Qwen3VL", (qwen3, text3.to_dict(), qwen_visuals(frame_spans=True)), **ids),
    ]


def llava_cases() -> list[Case]:
    clip = vision_config("CLIPVision", layers=3)
    clip_unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    clip_select = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    siglip = vision_config("SiglipVision", ONEVISION_GRID, vision_use_head=False)
    siglip_unused = ("model.vision_tower.post_layernorm.",)
    siglip_options = {"video_token_id": VIDEO, "image_grid_pinpoints": ONEVISION_PINPOINTS}
    clip_next, next_options = vision_config("CLIPVision", ONEVISION_GRID, layers=3), dict(siglip_options)
    del next_options["video_token_id"]
    next_visuals = {"image": onevision_visuals()["image"]}
    internvl = vision_config("InternVLVision", attention_bias=True)
    one_tile, tiles = tile_visuals([1, 1, 1, 1, 1], GRID**2), tile_visuals([5, 1, 3, 1, 1], GRID**2 // MERGE**2)
    return [
        vlm_case("llava", "Llava", (clip, text_config("Llama"), one_tile), clip_unused, **clip_select),
        vlm_case(
            "llava_next",
            "LlavaNext",
            (clip_next, text_config("Mistral", kv_heads=4, sliding_window=None), next_visuals),
            clip_unused,
            **clip_select,
            **next_options,
        ),
        vlm_case(
            "llava_onevision",
            "LlavaOnevision",
            (siglip, text_config("Qwen2"), onevision_visuals()),
            siglip_unused,
            **siglip_options,
        ),
        vlm_case("internvl", "InternVL", (internvl, text_config("Qwen2", kv_heads=1), tiles)),
    ]


def marked(recipe: Callable[[torch.dtype], Batch], prefix: bool, dtype: torch.dtype) -> Batch:
    """token_type_ids as the processors give them: 1 at Gemma 3's images; 0 in PaliGemma's prefix, which is each row's
    beginning up to its last image and some text, and has no labels."""
    batch = recipe(dtype)
    if not prefix:
        return batch | {"token_type_ids": (batch["input_ids"] == IMAGE).long()}
    width = batch["input_ids"].shape[1]
    last = (torch.arange(width) * (batch["input_ids"] == IMAGE)).amax(1, keepdim=True)
    first = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).argmax(1, keepdim=True)
    suffix = torch.arange(width) > torch.maximum(last, first) + 2
    if "attention_mask" in batch:
        suffix &= batch["attention_mask"].bool()
    return batch | {"token_type_ids": suffix.long(), "labels": batch["labels"].masked_fill(~suffix, -100)}


def span_case(name: str, model: str, parts: tuple[Any, Any, dict[str, Visuals]], **options: Any) -> Case:
    """Gemma's norms round to float32."""
    case = vlm_case(name, model, parts, **options)
    batches = {name: partial(marked, recipe, model == "PaliGemma") for name, recipe in case.batches.items()}
    return replace(case, batches=batches, suite=(2, 3), dtype=torch.float32)


def gemma_cases() -> list[Case]:
    siglip = vision_config("SiglipVision", vision_use_head=False)
    every, pooled = tile_visuals([1] * 5, GRID**2), tile_visuals([1] * 5, 9)
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "layers": 3}
    gemma1 = text_config("Gemma", kv_heads=1)
    gemma2 = text_config("Gemma2", sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    # 14 heads on 3 ranks: spans in fractions of heads.
    gemma3 = text_config("Gemma3Text", kv_heads=2, num_attention_heads=14, hidden_size=112, sliding_window=7, **layers)
    options = {"mm_tokens_per_image": 9, "boi_token_id": VISION_START, "eoi_token_id": VISION_END}
    paligemma2 = span_case("paligemma2", "PaliGemma", (siglip, gemma2, every), projection_dim=WIDTH, attention="eager")
    return [
        span_case("paligemma", "PaliGemma", (siglip, gemma1, every), projection_dim=WIDTH),
        replace(paligemma2, suite=(2,)),
        span_case("gemma3", "Gemma3", (siglip, gemma3, pooled), **options),
    ]


# Height and width in pixels of pictures that are padded to squares of GRID x GRID patches.
PADDED = [(GRID * PATCH, GRID * PATCH), (16, 24), (24, 12), (20, 8), (24, 16)]


def padded_batch(name: str, recipe: Callable[[torch.dtype], Batch], dtype: torch.dtype) -> Batch:
    """Idefics and SmolVLM take (B, most images of a sample, 3, H, W), padding of pictures and of samples 0."""
    batch = recipe(dtype)
    counts = [sum(item == "image" for item in layout) for layout in LAYOUTS[name]]
    if not sum(counts):
        return batch
    pictures, taken = iter(batch["pixel_values"]), iter(PADDED)
    values = torch.zeros(len(counts), max(counts), *batch["pixel_values"].shape[1:], dtype=dtype)
    mask = torch.zeros(values[:, :, 0].shape, dtype=torch.long)
    for row, count in enumerate(counts):
        for column in range(count):
            height, width = next(taken)
            values[row, column, :, :height, :width] = next(pictures)[:, :height, :width]
            mask[row, column, :height, :width] = 1
    return batch | {"pixel_values": values, "pixel_attention_mask": mask}


def padded_case(name: str, model: str, parts: tuple[Any, Any, dict[str, Visuals]], **options: Any) -> Case:
    case = vlm_case(name, model, parts, **options)
    batches = {layout: partial(padded_batch, layout, recipe) for layout, recipe in case.batches.items()}
    return replace(case, batches=batches, suite=(3, 4))


def padded_cases() -> list[Case]:
    vision = vision_config("SiglipVision").to_diff_dict()  # of the same fields
    vision.pop("model_type")
    shuffled, resampled = tile_visuals([1] * 5, GRID**2 // MERGE**2), tile_visuals([1] * 5, 7)
    perceiver = {"hidden_size": WIDTH, "resampler_n_latents": 7, "resampler_depth": 1, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    mistral = text_config("Mistral", sliding_window=None)
    idefics2 = padded_case("idefics2", "Idefics2", (vision, mistral, resampled), perceiver_config=perceiver)
    return [
        replace(idefics2, suite=(2,), dtype=torch.float32),  # its resampler rounds to that, on each rank
        padded_case("idefics3", "Idefics3", (vision, text_config("Llama"), shuffled), scale_factor=MERGE),
        padded_case("smolvlm", "SmolVLM", (vision, text_config("Llama"), shuffled), scale_factor=MERGE),
    ]


def pixtral_visuals() -> dict[str, Visuals]:
    """Pictures of any size in one tensor, padded at the right and the bottom."""
    grids = [(10, 14), (4, 6), (4, 12), (6, 6), (2, 10)]

    def inputs(count: int, dtype: torch.dtype) -> Batch:
        sizes = torch.tensor(grids[:count]) * PATCH
        height, width = sizes.amax(0).tolist()
        return {"pixel_values": pixels(count, 3, height, width, dtype=dtype, seed=count), "image_sizes": sizes}

    return {"image": Visuals([[height * width // MERGE**2] for height, width in grids], inputs)}


def frames_as_images(recipe: Callable[[torch.dtype], Batch], dtype: torch.dtype) -> Batch:
    """GLM-4V's placeholders are the same in images and in frames of videos, of which a batch has one or the other."""
    batch = recipe(dtype)
    return batch | {"input_ids": batch["input_ids"].where(batch["input_ids"] != VIDEO, IMAGE)}


def packed_cases() -> list[Case]:
    pixtral = vision_config("PixtralVision", grid=14)
    mistral = text_config("Mistral", sliding_window=None)
    case = vlm_case("mistral3", "Mistral3", (pixtral, mistral, pixtral_visuals()), spatial_merge_size=MERGE)
    glm = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH, "depth": 2}
    glm |= {"intermediate_size": 80, "out_hidden_size": WIDTH, "image_size": 8 * PATCH}
    text = text_config("Glm4vText", kv_heads=2, **{ROPE: MROPE})
    ids = {"video_token_id": VIDEO, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
    visuals = qwen_visuals(frame_spans=True)
    glm4v = vlm_case("glm4v", "Glm4v", (glm, text.to_dict(), {"image": visuals["image"]}), **ids)
    video = partial(frames_as_images, partial(vlm_batch, "video", visuals, True))
    return [
        replace(case, suite=(3, 4)),
        # Its position embeddings are interpolated in float32.
        replace(glm4v, batches={**glm4v.batches, "video": video}, suite=(2,), dtype=torch.float32),
    ]


# Whose features every rank gets whole: LLaVA-OneVision's, where the composite and not the method ends videos (5.17).
FEATURES_GATHERED: set[str] = set()
if "image_newline" not in inspect.unwrap(hf.LlavaOnevisionModel.get_video_features).__code__.co_names:
    FEATURES_GATHERED.add("llava_onevision")
# Their tower is not sharded at all: a merger between its blocks leaves fewer tokens, or its masks are of another kind.
TOWER_WHOLE = ("minicpmv4_6", "mllama")


def odd_head_cases() -> list[Case]:
    """Head counts that no group of 2, 3 or 4 ranks divides, or whose query groups straddle ranks."""
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
    wide = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 28 * 8}
    return [
        vision_case("vit_25", "ViT", num_attention_heads=25, hidden_size=100),
        text_case("llama_28_4", "Llama", **wide),
        text_case("qwen2_28_4", "Qwen2", layers=3, sliding_window=7, **mixed, **wide),
        text_case("llama_5_1", "Llama", num_attention_heads=5, num_key_value_heads=1, hidden_size=40),
    ]


def vision_cases() -> list[Case]:
    return [
        vision_case("vit", "ViT"),
        vision_case("clip_vision", "CLIPVision"),
        vision_case("siglip_vision", "SiglipVision", ONEVISION_GRID),
        vision_case("dinov2", "Dinov2", unused=("embeddings.mask_token",)),
    ]


def text_cases() -> list[Case]:
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
    softcap = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return [
        text_case("llama", "Llama"),
        text_case("mistral", "Mistral", sliding_window=7, kv_heads=2, ranks=(1, 2, 4)),
        text_case("qwen2", "Qwen2", layers=3, sliding_window=7, **mixed),
        text_case("gemma", "Gemma", kv_heads=1),
        text_case("gemma2", "Gemma2", attention="eager", sliding_window=7, **softcap),  # sdpa leaves out the softcap
        text_case("phi3", "Phi3", num_attention_heads=2 * HEADS, hidden_size=2 * WIDTH),
        text_case("phi3_longrope", "Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16),
        text_case("gpt_neox", "GPTNeoX"),
    ]


# --- recurrent layers --------------------------------------------------------------------------------------------

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 4, "mamba_chunk_size": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "experts_implementation": "eager"}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "layers": 3}


def hybrid(case: Case) -> Case:
    """The rules compute in float32 whatever the model's dtype is. Packed documents are apart only where there are
    kernels for it: the reference runs them one by one."""
    return replace(case, suite=(), documents_alone=True, widened=True)


def flat_patches(counts: list[tuple[int, int]], count: int, dtype: torch.dtype) -> Batch:
    """SigLIP 2 takes (N, most patches of an image, pixels of a patch), padding 0."""
    shapes = counts[:count]
    most = max(height * width for height, width in shapes)
    mask = torch.stack([torch.arange(most) < height * width for height, width in shapes]).long()
    patches = pixels(count, most, 3 * PATCH**2, dtype=dtype, seed=count) * mask[..., None]
    return {"pixel_values": patches, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}


def joined_patches(counts: list[tuple[int, int]], count: int, dtype: torch.dtype) -> Batch:
    """MiniCPM-V takes the patches of all images side by side."""
    shapes = counts[:count]
    patches = sum(height * width for height, width in shapes)
    return {"pixel_values": pixels(1, 3, PATCH, patches * PATCH, dtype=dtype), "target_sizes": torch.tensor(shapes)}


def small_vlm_cases(conv: dict[str, Any], text: dict[str, Any]) -> list[Case]:
    """LFM2-VL, whose features are gathered, and MiniCPM-V 4.6, whose tower stays whole."""
    lfm2 = text_config("Lfm2", **conv).to_dict()
    vision = {"hidden_size": HEADS * 4, "num_attention_heads": HEADS, "intermediate_size": 64, "patch_size": PATCH}
    siglip2 = vision | {"model_type": "siglip2_vision_model", "num_hidden_layers": 2, "num_patches": GRID**2}
    siglip2["vision_use_head"] = False
    flat = [(6, 4), (4, 4), (2, 6), (4, 8), (6, 6)]
    flats = {"image": Visuals([[height * width // 4] for height, width in flat], partial(flat_patches, flat))}
    minicpm = vision | {"num_hidden_layers": 3, "image_size": GRID * PATCH, "insert_layer_id": 1}
    joined = [(8, 8), (4, 8), (4, 4), (8, 4), (12, 4)]
    joint = {"image": Visuals([[height * width // 16] for height, width in joined], partial(joined_patches, joined))}
    ids = {"video_token_id": VIDEO, "image_size": GRID * PATCH, "insert_layer_id": 1}
    return [
        hybrid(vlm_case("lfm2_vl", "Lfm2Vl", (siglip2, lfm2, flats), projector_hidden_size=40)),
        hybrid(vlm_case("minicpmv4_6", "MiniCPMV4_6", (minicpm, text, joint), **ids)),
    ]


def hybrid_cases() -> list[Case]:
    """In `tests/wrappers/test_hybrids.py`, each on a few ranks."""
    small = {"kv_heads": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 24}
    delta = MIXED | DELTA | small
    mrope = delta | {ROPE: MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}}
    moe = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24}
    mamba = MAMBA | small | {"layers": 3, "mamba_d_head": "auto", "mamba_expand": 3}
    nemotron = small | {"layer_types": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]}
    nemotron |= {"mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 16}
    nemotron |= EXPERTS | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24}
    kimi = MIXED | small | {"linear_num_heads": 3, "linear_head_dim": 8, "mlp_layer_types": ["dense"] * 3}
    kimi |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4, "kv_heads": 4}
    granite = mamba | EXPERTS | {"num_local_experts": 4, "shared_intermediate_size": 24} | MIXED
    vision = {"num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": WIDTH, "depth": 2}
    vision |= {"intermediate_size": 80, "out_hidden_size": 32, "num_position_embeddings": 64}
    ids = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    conv = small | {"layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    lara = moe | delta | {"layer_types": ["linear_attention", "full_attention", "sliding_attention"]}
    text = text_config("Qwen3_5Text", **mrope).to_dict()
    text_moe = text_config("Qwen3_5MoeText", **mrope, **moe).to_dict()
    visuals = qwen_visuals(frame_spans=True)
    return [
        hybrid(text_case("qwen3_5", "Qwen3_5", **mrope)),
        hybrid(text_case("qwen3_5_moe", "Qwen3_5Moe", **mrope, **moe)),
        hybrid(text_case("qwen3_next", "Qwen3Next", **delta, **moe)),
        hybrid(text_case("olmo_hybrid", "OlmoHybrid", **delta)),
        hybrid(text_case("kimi_linear", "KimiLinear", **kimi)),
        hybrid(text_case("lara_mini", "LaraMini", sliding_window=7, **lara)),
        hybrid(text_case("bailing_hybrid", "BailingHybrid", num_local_experts=4, **kimi)),
        hybrid(text_case("lfm2", "Lfm2", **conv)),
        hybrid(text_case("lfm2_moe", "Lfm2Moe", num_dense_layers=1, num_experts=4, **EXPERTS, **conv)),
        hybrid(text_case("nemotron_h", "NemotronH", **nemotron)),
        hybrid(text_case("bamba", "Bamba", attn_layer_indices=[1], **mamba)),
        hybrid(text_case("falcon_h1", "FalconH1", mamba_d_ssm=96, **mamba)),
        # Its masks are made without position_ids: nothing keeps documents apart, in one process or on ranks.
        replace(hybrid(text_case("granite_hybrid", "GraniteMoeHybrid", **granite)), documents_alone=False),
        hybrid(vlm_case("qwen3_5_vl", "Qwen3_5", (vision, text, visuals), **ids)),
        hybrid(
            vlm_case("qwen3_5_moe_vl", "Qwen3_5Moe", (vision, text_moe, visuals), experts_implementation="eager", **ids)
        ),
        *small_vlm_cases(conv, text),
    ]


def is_installed(case: Case) -> bool:
    """Whether the installed version of transformers has a case's model."""
    model, config, *_ = case.build.args if isinstance(case.build, partial) else ("", None)
    return not isinstance(config, Missing) and hasattr(transformers, model)


CASES = {
    case.name: case
    for case in (
        *hybrid_cases(),
        *qwen_cases(),
        *llava_cases(),
        *gemma_cases(),
        *padded_cases(),
        *packed_cases(),
        *vision_cases(),
        *text_cases(),
        *odd_head_cases(),
    )
    if is_installed(case)
}

from kit import special  # noqa: E402  # made of what stands above

CASES |= {case.name: case for case in special.cases() if is_installed(case)}
FEATURES_GATHERED |= special.GATHERED
