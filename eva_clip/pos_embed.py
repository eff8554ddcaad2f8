"""Resize learned absolute position embeddings to another patch grid, the published way or timm's."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

MODES = ("eva", "timm")


def resize_pos_embed(
    pos_embed: torch.Tensor,
    target_grid: int | tuple[int, int],
    num_prefix_tokens: int = 1,
    mode: str = "eva",
) -> torch.Tensor:
    """Interpolate the patch rows of `pos_embed`; prefix rows (class token) are kept as they are.

    Interpolation is bicubic in float32 with `align_corners=False`; the result has the input's dtype. The modes differ
    in one word: "eva" is the published code's, without antialias; "timm" is with it. On growing grids they differ all
    the same, because antialiasing changes the cubic kernel (a = -0.5 instead of -0.75).

    Args:
        pos_embed: [1, P + N, D] with P prefix tokens and N = h·w patches of a square grid.
        target_grid: side of the new square grid, or (height, width), in patches.
        num_prefix_tokens: P.
        mode: "eva" or "timm".

    Returns:
        [1, P + target_height·target_width, D]; the input itself when the grid does not change.

    Raises:
        ValueError: unknown mode, an input of another shape, patch rows that are no square grid, or an empty target.
    """
    if mode not in MODES:
        raise ValueError(f"unknown pos_embed mode {mode!r}; expected one of {', '.join(MODES)}")
    height, width = (target_grid, target_grid) if isinstance(target_grid, int) else target_grid
    if height < 1 or width < 1:
        raise ValueError(f"target grid {height}x{width} is empty; expected at least 1x1 patches")
    if pos_embed.ndim != 3 or pos_embed.shape[0] != 1:
        raise ValueError(f"position embeddings have shape {list(pos_embed.shape)}; expected [1, tokens, width]")
    num_patches = pos_embed.shape[1] - num_prefix_tokens
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise ValueError(
            f"{pos_embed.shape[1]} position rows less {num_prefix_tokens} prefix rows leave {num_patches}, which is "
            "no square grid; check num_prefix_tokens"
        )
    if (side, side) == (height, width):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False, antialias=mode == "timm")
    patches = grid.permute(0, 2, 3, 1).reshape(1, height * width, -1).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)
