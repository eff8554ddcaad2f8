"""Augmentation of a whole batch of RGBA pictures at once, in torch on the CPU.

One `grid_sample` does crop, zoom, rotation, shift and mirror; one 3 x 3 matrix a picture does brightness,
contrast, saturation and hue. Colours are kept closer to the original than in photographic contrastive
learning, because colour says much about an emoji.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from eva_clip.specs import CLIP_MEAN, CLIP_STD

WHITE_SHARE = 0.5
"""Share of pictures put on white, as they are evaluated; the rest get one random colour each."""


def normalise(images: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1], [B, 3, H, W], to CLIP's mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(values, dtype=images.dtype).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def affine_grids(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random sampling grids [count, size, size, 2]: zoom, aspect, rotation to 15 degrees, shift, mirror."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    extent = torch.exp(uniform(math.log(0.6), math.log(1.2)))  # side of the seen window over the picture's
    aspect = torch.exp(uniform(-0.15, 0.15))
    angle = uniform(-15, 15) * (torch.rand(count, generator=generator) < 0.6) * math.pi / 180
    mirror = torch.where(torch.rand(count, generator=generator) < 0.4, -1.0, 1.0)
    room = (1 - extent).abs() + 0.06  # a window inside the picture may go to its edge and a little further
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            torch.stack([extent * aspect * cos * mirror, -extent * sin, uniform(-1, 1) * room], 1),
            torch.stack([extent * sin * mirror, extent / aspect * cos, uniform(-1, 1) * room], 1),
        ],
        1,
    )
    return F.affine_grid(theta, [count, 4, size, size], align_corners=False)


def colour_matrices(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices [count, 3, 3] and offsets [count, 3, 1] for RGB in [0, 1]; a tenth are grey."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 1, 3).expand(count, 3, 3)
    eye = torch.eye(3).expand(count, 3, 3)
    grey = (torch.rand(count, 1, 1, generator=generator) < 0.1).float()
    saturation = uniform(0.6, 1.4) * (1 - grey)
    matrix = luma + (eye - luma) * saturation
    angle = (uniform(-0.35, 0.35) * (torch.rand(count, 1, 1, generator=generator) < 0.5)).squeeze()
    cos, sin, third = torch.cos(angle), torch.sin(angle), 1 / 3
    a, b, c = (
        third + (2 / 3) * cos,
        third * (1 - cos) - sin / math.sqrt(3),
        third * (1 - cos) + sin / math.sqrt(3),
    )
    hue = torch.stack([a, b, c, c, a, b, b, c, a], 1).view(count, 3, 3)  # rotation about the grey axis
    contrast, brightness = uniform(0.75, 1.25), uniform(-0.12, 0.12)
    return (matrix @ hue) * contrast, (0.5 * (1 - contrast) + brightness).expand(count, 3, 1)


def augment(pictures: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """RGBA uint8 [B, 4, H, W] to normalised RGB [B, 3, size, size]."""
    count = len(pictures)
    rgba = pictures.float() / 255
    alpha = rgba[:, 3:]
    seen = F.grid_sample(
        torch.cat([rgba[:, :3] * alpha, alpha], 1),
        affine_grids(count, size, generator),
        align_corners=False,
    )
    colour, alpha = seen[:, :3], seen[:, 3:]
    matrix, offset = colour_matrices(count, generator)
    jittered = torch.baddbmm(offset * alpha.flatten(2), matrix, colour.flatten(2)).view_as(colour)
    ground = torch.rand(count, 3, 1, 1, generator=generator)
    ground[torch.rand(count, generator=generator) < WHITE_SHARE] = 1.0
    images = (jittered + (1 - alpha) * ground).clamp_(0, 1)
    soft = (torch.rand(count, generator=generator) < 0.2).nonzero().squeeze(1)
    images[soft] = F.avg_pool2d(images[soft], 3, 1, 1, count_include_pad=False)
    return normalise(images)


def on_white(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """RGBA uint8 [B, 4, H, W] to normalised RGB [B, 3, size, size] on white, unaugmented."""
    rgba = pictures.float() / 255
    images = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    return normalise(F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1))
