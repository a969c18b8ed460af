"""Vision transformers as people write them without Hugging Face: every way of attending, and things that must fail."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 24, 6


def split_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    rows, tokens, _ = x.shape
    return x.view(rows, tokens, parts, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)


class SDPAAttention(nn.Module):
    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class CausalAttention(SDPAAttention):
    causal = True


class MatmulAttention(SDPAAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class MixingAttention(SDPAAttention):
    """Calls scaled_dot_product_attention, but its tokens meet elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


class Block(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module] = SDPAAttention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TorchBlock(Block):
    """nn.MultiheadAttention, called as in the documentation: it then returns weights, and multiplies itself."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(self.norm2(x))


class InlineBlock(nn.Module):
    """No attention module: the block attends itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(self.norm(x)), 3)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ScaledBlock(Block):
    """Residual branches that start near zero, as in CaiT: they hide what happens inside."""

    def __init__(self, attention: Callable[[], nn.Module] = SDPAAttention) -> None:
        super().__init__(attention)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvBlock(Block):
    """Tokens meet outside of attention: cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


class RotaryBlock(Block):
    """Takes a table (N, D) of the positions of an image."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = split_heads(self.attn.qkv(self.norm1(x)), 3)
        q, k = (y * angles.cos() + y.flip(-1) * angles.sin() for y in (q, k))
        return x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Pixels to features: a convolution, a CLS token, positions, blocks, a norm."""

    def __init__(self, blocks: nn.Module, tokens_first: bool = False, side: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, side * side + 1, WIDTH))
        self.blocks, self.norm, self.tokens_first = blocks, nn.LayerNorm(WIDTH), tokens_first

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        x = x.transpose(0, 1) if self.tokens_first else x
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.norm(x.transpose(0, 1) if self.tokens_first else x)


def torch_layer(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first)


def vit(make: Callable[[], nn.Module], container: type = nn.ModuleList) -> ViT:
    blocks = [make() for _ in range(2)]
    return ViT(container(blocks) if container is nn.ModuleList else container(*blocks))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: vit(Block),
    "causal": lambda: vit(lambda: Block(CausalAttention)),
    "multihead": lambda: vit(TorchBlock),
    "torch_layers": lambda: vit(lambda: torch_layer(True)),
    "torch_encoder": lambda: ViT(nn.TransformerEncoder(torch_layer(True), 2)),
    "tokens_first": lambda: ViT(nn.TransformerEncoder(torch_layer(False), 2, enable_nested_tensor=False), True),
    "matmul": lambda: vit(lambda: Block(MatmulAttention)),
    "inline": lambda: vit(InlineBlock),
    "sequential": lambda: vit(Block, nn.Sequential),
    "mixing": lambda: vit(lambda: Block(MixingAttention)),
    "scaled": lambda: vit(lambda: ScaledBlock(MixingAttention)),
    "conv": lambda: vit(ConvBlock),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def pixels(images: int) -> Tensor:
    return torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
