"""Build CLIP models of both towers, and the published entry point.

Tensors keep EVA-CLIP's published names: `visual.*` is the vision tower with its projection as `visual.head`, `text.*`
the text tower, and `logit_scale` stands at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from eva_clip.checkpoints import LoadReport, copy_tensors, match, open_checkpoint
from eva_clip.hub import resolve_weights
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_text_tower, build_vision_tower
from eva_clip.transforms import build_eval_transform

if TYPE_CHECKING:
    from PIL import Image

_KINDS = {"vision": "a vision encoder alone", "classifier": "an image classifier"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NoTextTowerError(ValueError):
    """A file of both towers was wanted and holds the vision tower alone."""


class EvaCLIP(nn.Module):
    """Two towers into one space: images [B, 3, H, W] and token ids [B, T] to embeddings [B, embed_dim]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.visual = build_vision_tower(spec)
        self.text = build_text_tower(spec)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Images [B, 3, H, W], normalised, to embeddings [B, embed_dim] in the model's dtype."""
        embedding: torch.Tensor = self.visual(image.to(self.visual.cls_token.dtype))
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Token ids [B, context_length] to embeddings [B, embed_dim]."""
        embedding: torch.Tensor = self.text(text)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised image features [B, D], normalised text features [B, D] and the scale exp(logit_scale) []."""
        return (
            self.encode_image(image, normalize=True),
            self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )


def build_model(
    model_name: str, weights: str = "", *, image_size: int | None = None, pos_embed: str = "eva"
) -> tuple[EvaCLIP, LoadReport | None]:
    """Build both towers of a model by name, in fp32 on the CPU, in eval mode.

    Args:
        model_name: official name or alias.
        weights: "" or "random" for freshly initialised weights, "pretrained" for the published ones, or a file.
        image_size: input side in pixels; None for the model's own. Position embeddings are resized once, here.
        pos_embed: how position embeddings of another grid are resized, "eva" or "timm".

    Returns:
        The model, and the report of what was loaded (None for random weights).

    Raises:
        ValueError: unknown model, a resolution the patches do not divide, or weights that do not fit.
        FileNotFoundError: no such weights file.
    """
    spec = get_model_spec(model_name)
    model = EvaCLIP(spec.at_image_size(image_size) if image_size else spec).eval()
    report = None if weights in ("", "random") else load_weights(model, weights, pos_embed=pos_embed)
    return model, report


def load_weights(model: EvaCLIP, weights: str | Path, *, pos_embed: str = "eva") -> LoadReport:
    """Load a file of both towers, of any known layout, into `model`, strictly and in place.

    Args:
        model: the target.
        weights: "pretrained" or a file.
        pos_embed: "eva" or "timm" (`resize_pos_embed`).

    Raises:
        NoTextTowerError: the file is of a vision tower alone.
        ValueError: it does not fit; every tensor at fault is named.
        FileNotFoundError: no such file.
    """
    file = open_checkpoint(resolve_weights(model.spec, weights), model_name=model.spec.name)
    if file.kind != "clip":
        raise NoTextTowerError(
            f"{file.path} holds {_KINDS[file.kind]} and no text tower, so it cannot be the whole of {model.spec.name}; "
            "use eva_clip.build_encoder or eva_clip.build_classifier with it, or name a file of both towers"
        )
    report, tensors = match(file, model.state_dict(), model.spec, pos_embed=pos_embed)
    copy_tensors(model, tensors)
    return report


def build_eva_model_and_transforms(
    model_name: str,
    pretrained: str = "",
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> tuple[EvaCLIP, Callable[[Image.Image], torch.Tensor]]:
    """The published entry point: a model in eval mode and its evaluation transform.

    Args:
        model_name: official name or alias (`eva_clip.list_models()`).
        pretrained: "" for random weights, "pretrained" for the published ones, or a checkpoint file.
        precision: "fp32", "bf16" or "fp16"; parameters and activations have this dtype.
        device: where the model is put.
        image_mean: per-channel mean over images in [0, 1], length 3; None takes the model's own (CLIP's).
        image_std: per-channel standard deviation, length 3; None takes the model's own.

    Returns:
        `(model, preprocess)`; `preprocess` maps a PIL image to a float32 tensor [3, H, W].

    Raises:
        ValueError: unknown model or precision, or weights that do not fit the model.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(DTYPES)}")
    model, _ = build_model(model_name, pretrained)
    spec = model.spec
    preprocess = build_eval_transform(
        spec.vision.image_size,
        mean=spec.image_mean if image_mean is None else image_mean,
        std=spec.image_std if image_std is None else image_std,
    )
    return model.to(device=device, dtype=DTYPES[precision]), preprocess
