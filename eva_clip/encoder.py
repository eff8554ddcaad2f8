"""`VisionEncoder`: images to features by an explicit definition, frozen in earnest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from eva_clip.checkpoints import Checkpoint, LoadReport, copy_tensors, match, open_checkpoint
from eva_clip.feature_kinds import kind_width, pool_kinds, take_kinds
from eva_clip.hub import resolve_weights
from eva_clip.models import DTYPES
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_vision_tower, has_mean_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timm.models.eva import Eva


@dataclass(frozen=True)
class FeatureDefinition:
    """What a feature is.

    All pools read the tokens after the tower's final norm: "cls" is the class token (the published probe's feature),
    "gap" the mean of the patch tokens, "cls+gap" both, concatenated, "cls_last<n>" the class tokens of the last n
    blocks (`eva_clip.feature_kinds`). A mean-pool file (a published fine-tune) has no final norm: there "gap", the only
    pool it allows, is the mean of the patch tokens, then its `fc_norm`.
    """

    pool: str = "cls"
    """One of "cls", "gap", "cls+gap", "cls_last<n>", "cls_last<n>+gap"."""
    projected: bool = False
    """Apply the tower's projection into the image-text space; defined for pool "cls" only."""
    l2norm: bool = False
    """Scale every feature to unit Euclidean length."""

    def __post_init__(self) -> None:
        pool_kinds(self.pool, self.projected)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds (`eva_clip.feature_kinds`) that the feature is the concatenation of."""
        return pool_kinds(self.pool, self.projected)

    def feature_dim(self, spec: ModelSpec) -> int:
        """Width D of the feature for a model."""
        return sum(kind_width(kind, spec) for kind in self.kinds)


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
        definition.feature_dim(spec)  # refuses more blocks than there are
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
        found = self.take_kinds(images, self.definition.kinds)
        features = torch.cat(list(found.values()), dim=1)
        return F.normalize(features, dim=-1) if self.definition.l2norm else features

    @torch.no_grad()
    def take_kinds(self, images: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """Normalised images [B, 3, H, W] to features by kind, from one forward pass; not scaled to unit length."""
        return take_kinds(self.tower, images.to(self.tower.cls_token.dtype), kinds)

    def weights_sha256(self, *, projection: bool = True) -> str:
        """Hash over names, dtypes, shapes and bytes of all tower tensors; changes when any value does.

        Args:
            projection: include the projection, where the encoder has one.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tower.state_dict().items()):
            if name.startswith("head.") and not projection:
                continue
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
