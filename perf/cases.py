"""The attention layers of real models on real kinds of batches: what every sweep measures, in order of importance.

Heads and head dims are those of the models' published configurations. A vision tower either cuts images into tiles of
a fixed number of tokens (CLIP, SigLIP, InternViT) or packs images of any size (Qwen); Qwen2.5-VL attends in windows of
64 patches in 28 of its 32 layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from triton_sp.plan.segments import Segments

K = 1024
SIZES = (16 * K, 64 * K, 4 * K, 1 * K, 256 * K)  # tokens, the most telling first
FRAME = 1024  # patches of a video frame of 448 x 448 pixels


@dataclass(frozen=True)
class AttentionCase:
    """One attention layer of a model on one batch.

    >>> case = AttentionCase("LLM, packed", (3, 5), heads=4, kv_heads=2, dim=64, causal=True)
    >>> case.tokens, case.pairs, case.flops
    (8, 21, 21504)
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    causal: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def dense(self) -> bool:
        """Whether all segments are of one length, so that it is a batch without padding too."""
        return len(set(self.lengths)) == 1

    @cached_property
    def segments(self) -> Segments:
        return Segments((0, *np.cumsum(self.lengths).tolist()))

    @property
    def pairs(self) -> int:
        """(row, key) pairs that see each other, in one head."""
        return self.segments.work(self.causal).total

    @property
    def flops(self) -> int:
        """Of the forward: two products of D multiplications for each pair and head. The backward has five."""
        return 4 * self.pairs * self.heads * self.dim

    @property
    def numbers(self) -> int:
        """That the forward must read and write: q, k, v and out. The backward reads these and writes as many."""
        return 2 * self.tokens * (self.heads + self.kv_heads) * self.dim

    def columns(self) -> dict[str, Any]:
        """The columns of a row that describe the case."""
        return {
            "case": self.name,
            "tokens": self.tokens,
            "segments": len(self.lengths),
            "longest": max(self.lengths),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "dim": self.dim,
            "causal": self.causal,
        }


def long_tail(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths as a mixed batch has them, log-normal around 400 with some above 5000, adding up to `tokens`.

    >>> long_tail(2000)
    (465, 341, 862, 332)
    """
    draw, lengths = np.random.default_rng(seed), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(max(16, int(draw.lognormal(np.log(400), 1.2))), left))
    return tuple(lengths)


def _vision(size: int) -> Iterator[AttentionCase]:
    def of(model: str, batch: str, lengths: tuple[int, ...], heads: int, dim: int) -> AttentionCase:
        return AttentionCase(f"{model}, {batch}", lengths, heads, heads, dim)

    def equal(length: int) -> tuple[int, ...]:
        return (length,) * max(size // length, 1)

    yield of("Qwen3-VL ViT", "image", (size,), 16, 72)
    yield of("Qwen2.5-VL ViT", "windows", equal(64), 16, 80)
    yield of("Qwen2-VL ViT", "image", (size,), 16, 80)
    yield of("InternViT-300M", "tiles", equal(1025), 16, 64)
    yield of("InternViT-6B", "tiles", equal(1025), 25, 128)
    yield of("Qwen3-VL ViT", "mixed", long_tail(size), 16, 72)
    yield of("Qwen3-VL ViT", "video", equal(min(FRAME, size)), 16, 72)
    yield of("SigLIP-so400m", "multi-image", equal(729), 16, 72)
    yield of("CLIP-L/336", "multi-image", equal(577), 16, 64)
    yield of("Qwen2.5-VL ViT", "multi-image", equal(max(size // 4, 64)), 16, 80)


def _language(size: int) -> Iterator[AttentionCase]:
    def of(model: str, batch: str, lengths: tuple[int, ...], heads: int, kv_heads: int) -> AttentionCase:
        return AttentionCase(f"{model}, {batch}", lengths, heads, kv_heads, 128, causal=True)

    yield of("Qwen2.5-VL-7B LLM", "document", (size,), 28, 4)
    yield of("Qwen3-VL-8B LLM", "document", (size,), 32, 8)
    yield of("Qwen2.5-VL-7B LLM", "packed", long_tail(size), 28, 4)
    yield of("InternVL2.5-26B LLM", "document", (size,), 48, 8)
    yield of("LLaVA-1.5-7B LLM", "document", (size,), 32, 32)


def headline_cases(size: int = SIZES[0]) -> list[AttentionCase]:
    """What decides whether the kernels are good, the most telling first: layers as one process has them, and as one of
    several ranks does, which has few heads of the whole stream. There a grid may not fill the device.

    >>> [(case.name, case.heads, case.kv_heads) for case in headline_cases()[1:3]]
    [('Qwen3-VL-8B LLM, document, a rank of 8', 4, 1), ('Qwen2.5-VL-7B LLM, document, a rank of 4', 7, 1)]
    """
    vision = {case.name: case for case in _vision(size)}
    causal = {"dim": 128, "causal": True}
    return [
        vision["Qwen3-VL ViT, image"],
        AttentionCase("Qwen3-VL-8B LLM, document, a rank of 8", (size,), 4, 1, **causal),
        AttentionCase("Qwen2.5-VL-7B LLM, document, a rank of 4", (size,), 7, 1, **causal),
        AttentionCase("Qwen3-VL ViT, image, a rank of 8", (size,), 2, 2, 72),
        vision["Qwen2.5-VL ViT, windows"],
        vision["Qwen2-VL ViT, image"],
        vision["InternViT-300M, tiles"],
        vision["Qwen3-VL ViT, mixed"],
        AttentionCase("Qwen3-VL-8B LLM, document, a rank of 8", (size // 2,), 4, 1, **causal),
    ]


def attention_cases(sizes: tuple[int, ...] = SIZES) -> list[AttentionCase]:
    """All of them, size by size; vision and language in turns."""
    found = []
    for size in sizes:
        vision, language = list(_vision(size)), list(_language(size))
        for index, case in enumerate(vision):
            found += [case, *language[index // 2 : index // 2 + 1][: index % 2]]
    return found
