"""`VisionEncoder`: images to features by an explicit definition, frozen in earnest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from eva_clip.checkpoints import Checkpoint, LoadReport, copy_tensors, match, open_checkpoint
from eva_clip.hub import resolve_weights
from eva_clip.models import DTYPES
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_vision_tower, has_mean_pool, pool_tokens

if TYPE_CHECKING:
    from timm.models.eva import Eva

POOLS = ("cls", "gap", "cls+gap")


@dataclass(frozen=True)
class FeatureDefinition:
    """What a feature is.

    All pools read the tokens after the tower's final norm: "cls" is the class token (the published probe's feature),
    "gap" the mean of the patch tokens, "cls+gap" both, concatenated. A mean-pool file (a published fine-tune) has no
    final norm: there "gap", the only pool it allows, is the mean of the patch tokens, then its `fc_norm`.
    """

    pool: str = "cls"
    """One of "cls", "gap", "cls+gap"."""
    projected: bool = False
    """Apply the tower's projection into the image-text space; defined for pool "cls" only."""
    l2norm: bool = False
    """Scale every feature to unit Euclidean length."""

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"unknown pool {self.pool!r}; expected one of {', '.join(POOLS)}")
        if self.projected and self.pool != "cls":
            raise ValueError(
                f"projected features need pool 'cls', found {self.pool!r}: the projection was trained on the class "
                "token alone; set pool to 'cls' or projected to false"
            )

    def feature_dim(self, spec: ModelSpec) -> int:
        """Width D of the feature for a model."""
        if self.projected:
            return spec.embed_dim
        return spec.vision.width * (2 if self.pool == "cls+gap" else 1)


class VisionEncoder(nn.Module):
    """A frozen vision tower: images [B, 3, H, W] to features [B, D] in the tower's dtype.

    Frozen means: no parameter takes gradients, `train()` leaves it in eval mode (no drop path, no moving statistics),
    and `forward` records no graph.

    Raises:
        ValueError: a class-token feature of a mean-pool tower.
    """

    def __init__(self, tower: Eva, spec: ModelSpec, definition: FeatureDefinition) -> None:
        super().__init__()
        if has_mean_pool(tower) and definition.pool != "gap":
            raise ValueError(
                f"features of pool {definition.pool!r} were asked of a mean-pool encoder (it has fc_norm and no norm), "
                "whose class token was never trained for it; set pool to 'gap'"
            )
        if not definition.projected:
            tower.reset_classifier(0)  # the projection would be counted, hashed and moved, but never used
        self.tower = tower
        self.spec = spec
        self.definition = definition
        self.requires_grad_(False)
        super().train(False)

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.definition.feature_dim(self.spec)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in eval mode, whatever a trainer asks for."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, H, W] to features [B, D]."""
        tokens = self.tower.forward_features(images.to(self.tower.cls_token.dtype))  # [B, 1 + N, width]
        features = pool_tokens(self.tower, tokens, self.definition.pool)
        if self.definition.projected:
            features = self.tower.head(features)
        return F.normalize(features, dim=-1) if self.definition.l2norm else features

    def weights_sha256(self) -> str:
        """Hash over names, dtypes, shapes and bytes of all tower tensors; changes when any value does."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def build_encoder(
    model_name: str,
    weights: str = "pretrained",
    *,
    definition: FeatureDefinition | None = None,
    image_size: int | None = None,
    pos_embed: str = "eva",
    precision: str = "fp32",
) -> tuple[VisionEncoder, LoadReport | None]:
    """Build the frozen vision encoder of a model.

    Args:
        model_name: official name or alias.
        weights: "pretrained", "random", or a checkpoint file.
        definition: what a feature is; None for the published probe's (final-norm class token).
        image_size: input side in pixels; None for the model's own. Position embeddings are resized once, here.
        pos_embed: resizing mode, "eva" or "timm".
        precision: "fp32", "bf16" or "fp16", the dtype of weights and features.

    Returns:
        The encoder, and the report of what was loaded (None for random weights).

    Raises:
        ValueError: unknown name or precision, a resolution the patches do not divide, or weights that do not fit.
        FileNotFoundError: no such weights file.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(DTYPES)}")
    definition = definition or FeatureDefinition()
    spec = get_model_spec(model_name)
    spec = spec.at_image_size(image_size) if image_size else spec
    if weights in ("", "random"):
        tower, report = build_vision_tower(spec).eval(), None
    else:
        file = open_checkpoint(resolve_weights(spec, weights), model_name=spec.name)
        tower, report = _load_tower(spec, file, definition, pos_embed)
    return VisionEncoder(tower, spec, definition).to(DTYPES[precision]), report


def _load_tower(
    spec: ModelSpec, file: Checkpoint, definition: FeatureDefinition, pos_embed: str
) -> tuple[Eva, LoadReport]:
    """The vision tower of a file of any kind; its layout decides the pooling, and whatever is not vision is spared."""
    has_head = any(name.startswith("visual.head.") for name in file.tensors)
    if definition.projected and not has_head:
        raise ValueError(
            f"{file.path} holds no projection (visual.head) and projected features were asked for; set projected to "
            "false, or name a file of both towers"
        )
    tower = build_vision_tower(
        spec,
        num_classes=None if definition.projected else 0,
        global_pool="avg" if file.pool == "gap" else "token",
    ).eval()
    target = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    spare = ("text.", "logit_scale", "classifier.", "visual.head.")
    report, tensors = match(file, target, spec, may_spare=spare, pos_embed=pos_embed)
    copy_tensors(tower, {name.removeprefix("visual."): tensor for name, tensor in tensors.items()})
    return tower, report
