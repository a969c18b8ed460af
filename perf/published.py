"""Speeds that others have published: constants with their source, in rows of their own, never measured here."""

from __future__ import annotations

from perf.rows import Row

# pytorch/benchmark PR 2391 (2024-07): Triton's tutorial 06-fused-attention on an H100, forward without causality, head
# dim 128, 16 heads, B x S = 16384 tokens: TFLOP/s by S.
TUTORIAL = {512: 328.882, 1024: 389.723, 2048: 433.721, 4096: 458.359, 8192: 470.732, 16384: 476.753}
# FlashAttention-3, arXiv:2407.08608, figure 5: the same shapes on an H100 SXM5, S = 16384.
FIGURE_5 = {
    (64, "Triton"): 403, (64, "FA2"): 324, (64, "cuDNN"): 413, (64, "FA3"): 497,
    (128, "Triton"): 395, (128, "FA2"): 370, (128, "cuDNN"): 595, (128, "FA3"): 648,
}  # fmt: skip


def published() -> list[Row]:
    """The rows, of fp16 or bf16 on an H100."""

    def row(provider: str, length: int, dim: int, rate: float, source: str) -> Row:
        shape = {"tokens": 16384, "segments": 16384 // length, "longest": length, "dim": dim}
        return Row(
            "attend", provider, "H100, dense batch", kind="published", device="cuda", dtype="half", heads=2048 // dim,
            kv_heads=2048 // dim, tflops=rate, note=source, **shape,
        )  # fmt: skip

    tutorial = [row("Triton tutorial", s, 128, rate, "pytorch/benchmark PR 2391") for s, rate in TUTORIAL.items()]
    figure = [row(name, 16384, dim, rate, "arXiv:2407.08608 fig. 5") for (dim, name), rate in FIGURE_5.items()]
    return tutorial + figure
