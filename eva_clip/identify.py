"""Which model a file's shapes belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from eva_clip.spec_types import ModelSpec
from eva_clip.specs import all_model_specs


@dataclass(frozen=True)
class Shape:
    """The figures that tell models apart; None where a file does not say."""

    family: str | None = None
    """"clip", "eva02", or "eva01" (bigE has the same names)."""
    width: int | None = None
    patch_size: int | None = None
    layers: int | None = None
    mlp_width: int | None = None
    embed_dim: int | None = None
    text_width: int | None = None
    text_layers: int | None = None

    def fits(self, other: Shape) -> bool:
        """Whether no figure that both state differs."""
        return not self.differences(other)

    def differences(self, other: Shape) -> list[str]:
        """Figures that both state and that differ, as "width 1408, expected 192"."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [
            f"{name} {mine}, expected {theirs}"
            for name, mine, theirs in pairs
            if None not in (mine, theirs) and mine != theirs
        ]


def shape_of_spec(spec: ModelSpec) -> Shape:
    """The figures of a specification."""
    vision = spec.vision
    family = "eva01" if vision.family == "eva02_post_norm" else vision.family
    return Shape(
        family,
        vision.width,
        vision.patch_size,
        vision.layers,
        vision.mlp_width,
        spec.embed_dim,
        spec.text.width,
        spec.text.layers,
    )


def shape_of_tensors(tensors: Mapping[str, torch.Tensor]) -> Shape:
    """The figures of a file's tensors, under our names."""
    mlp = _first(tensors, r"visual\.blocks\.\d+\.mlp\.fc1(_g)?\.weight")
    return Shape(
        family=_family(tensors),
        width=_size(tensors.get("visual.cls_token"), -1) or _size(tensors.get("visual.pos_embed"), -1),
        patch_size=_size(tensors.get("visual.patch_embed.proj.weight"), -1),
        layers=_count(tensors, r"visual\.blocks\.(\d+)\."),
        mlp_width=_size(mlp, 0),
        embed_dim=_size(tensors.get("visual.head.weight"), 0) or _size(tensors.get("text.text_projection"), -1),
        text_width=_size(tensors.get("text.token_embedding.weight"), -1),
        text_layers=_count(tensors, r"text\.transformer\.resblocks\.(\d+)\."),
    )


def fitting_specs(tensors: Mapping[str, torch.Tensor], near: ModelSpec | None = None) -> list[ModelSpec]:
    """Known models whose shapes do not contradict the tensors, `near` first, then those of the file's position grid."""
    shape, grid = shape_of_tensors(tensors), position_grid(tensors)
    fitting = [spec for spec in all_model_specs() if shape.fits(shape_of_spec(spec))]
    return sorted(fitting, key=lambda spec: (near is None or spec.name != near.name, spec.vision.grid_size != grid))


def position_grid(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Side of the file's position grid in patches; None where there is none, or where it is no square."""
    pos_embed = tensors.get("visual.pos_embed")
    if pos_embed is None or pos_embed.ndim != 3:
        return None
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    return side if side and side * side == patches else None


def _family(tensors: Mapping[str, torch.Tensor]) -> str | None:
    if "visual.norm_pre.weight" in tensors or _first(tensors, r"visual\.blocks\.\d+\.attn\.qkv\.bias") is not None:
        return "clip"
    if _first(tensors, r"visual\.blocks\.\d+\.mlp\.fc1_g\.") is not None:
        return "eva02"
    return "eva01" if _first(tensors, r"visual\.blocks\.\d+\.attn\.qkv\.") is not None else None


def _first(tensors: Mapping[str, torch.Tensor], pattern: str) -> torch.Tensor | None:
    compiled = re.compile(pattern)
    return next((tensor for key, tensor in tensors.items() if compiled.match(key)), None)


def _size(tensor: torch.Tensor | None, dim: int) -> int | None:
    return tensor.shape[dim] if tensor is not None and tensor.ndim else None


def _count(tensors: Mapping[str, torch.Tensor], pattern: str) -> int | None:
    compiled = re.compile(pattern)
    numbers = [int(match.group(1)) for key in tensors if (match := compiled.match(key))]
    return max(numbers) + 1 if numbers else None
