"""Small transformers in plain torch, to try recipes and runtimes on: nothing to download, and quick to build."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTH = 3
FRAMES = 3
GRID = 8


class SmallVisionTransformer(nn.Module):
    """A class token and 8 x 8 patches of an image of 32 x 32 pixels through three blocks.

    Shapes: image [B, 3, 32, 32] -> features [B, 65, 32].
    """

    def __init__(self, width: int = 32, heads: int = 2, depth: int = DEPTH) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.norm(self.blocks(x))


class SmallVideoTransformer(nn.Module):
    """Three frames of 8 x 8 patches that attend to each other within a frame and over all frames, in turn.

    Shapes: video [B, 3, 3 frames, 32, 32] -> features [B, 192, 32].
    """

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, width, (1, 4, 4), (1, 4, 4))
        self.position = nn.Parameter(torch.zeros(1, FRAMES * GRID * GRID, width))
        self.within, self.over = (nn.ModuleList(_Block(width, heads) for _ in range(depth)) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patches(video).flatten(2).transpose(1, 2) + self.position
        for within, over in zip(self.within, self.over, strict=True):
            x = within(x.reshape(-1, GRID * GRID, x.shape[2])).reshape(-1, FRAMES * GRID * GRID, x.shape[2])
            x = over(x)
        return self.norm(x)


class _Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


MODELS = ("image", "video")


def small_model(name: str = "image", seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A small model of "image" or "video" with random weights, none of them zero, and an example of its input.

    Attention is not flat and tokens differ, so that rounding does not decide which of them stay.
    """
    model = SmallVisionTransformer() if name == "image" else SmallVideoTransformer()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() < 2 else 1.5 * parameter[0].numel() ** -0.5
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale + (parameter if parameter.dim() < 2 else 0.0))
    shape = (2, 3, 4 * GRID, 4 * GRID) if name == "image" else (2, 3, FRAMES, 4 * GRID, 4 * GRID)
    return model.eval(), torch.randn(shape, generator=generator)
