"""Compute of a vision tower from its shape. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eva_clip.spec_types import VisionConfig


def vision_gflop(vision: VisionConfig) -> float:
    """Matrix products of the vision tower on one image, in 10^9 floating-point operations (two a multiply-add).

    534 for ViT-g/14 at 224 pixels.
    """
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, width = patches + 1, vision.width
    matrices = 3 if vision.family == "eva02" else 2  # SwiGLU has a gate
    hidden = int(width * vision.mlp_ratio)
    weights = tokens * (4 * width**2 + matrices * width * hidden)
    attention = 2 * tokens**2 * width
    patch_embedding = patches * 3 * vision.patch_size**2 * width
    return 2 * (vision.layers * (weights + attention) + patch_embedding) / 1e9
