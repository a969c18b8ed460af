"""What the cases of the zoo are made of: tiny configurations, texts and pictures. Plain functions; a process that
imports this builds the same weights as every other.

Sizes are chosen to be awkward. Patch counts, and the number of real tokens of a text batch, leave remainder 1, 5, 7 or
11 by 12, so that no group of 2, 3 or 4 ranks divides them. Head counts are 12, which they all divide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


# --- options that several families have --------------------------------------------------------------------------

WIDTH = HEADS * 8  # of Qwen's towers and of the text models
ROPE = "rope_parameters" if hasattr(hf.Qwen2VLTextConfig(), "rope_parameters") else "rope_scaling"  # before 5
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 4.0}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "experts_implementation": "eager"}
