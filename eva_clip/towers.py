"""Build the towers of a model: timm's `Eva` or `VisionTransformer` for images, open_clip's `TextTransformer` for text.

Every vision tower has one interface: `cls_token` [1, 1, D], `pos_embed` [1, 1 + N, D], `blocks`, `norm` or `fc_norm`,
`head`, and `forward_features` from images [B, 3, H, W] to tokens [B, 1 + N, D].
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eva_clip.spec_types import ModelSpec

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer
    from timm.models.eva import Eva

ROTARY_GRID = 16
"""Patches along a side that rotary frequencies were trained for: 224 pixels in patches of 14."""

_EVA_OPTIONS: dict[str, dict[str, Any]] = {
    "eva01": {},
    "eva02": {
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (ROTARY_GRID, ROTARY_GRID),
    },
    "eva02_post_norm": {"use_post_norm": True},
}


def build_vision_tower(
    spec: ModelSpec,
    *,
    num_classes: int | None = None,
    global_pool: str = "token",
    drop_path_rate: float | None = None,
) -> Eva:
    """The vision tower of a model, freshly initialised.

    LayerNorm eps is 1e-6 in the EVA families and 1e-5 in CLIP's; GELU is exact unless the model says otherwise.

    Args:
        spec: the model; its `vision.image_size` sets the position grid.
        num_classes: outputs of `head`, 0 for none; None for the projection to `spec.embed_dim`.
        global_pool: "token" (final-norm class token) or "avg" (mean of patch tokens without `norm`, then `fc_norm`).
        drop_path_rate: stochastic depth of the last block; None takes the specification's.
    """
    vision = spec.vision
    shape: dict[str, Any] = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.width,
        "depth": vision.layers,
        "num_heads": vision.width // vision.head_width,
        "mlp_ratio": vision.mlp_ratio,
        "num_classes": spec.embed_dim if num_classes is None else num_classes,
        "global_pool": global_pool,
        "drop_path_rate": vision.drop_path_rate if drop_path_rate is None else drop_path_rate,
    }
    if vision.family != "clip":
        from timm.models.eva import Eva

        return Eva(**shape, **_EVA_OPTIONS[vision.family])
    return _build_clip_tower(spec, shape, projects=num_classes is None)


def _build_clip_tower(spec: ModelSpec, shape: dict[str, Any], projects: bool) -> Eva:
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import VisionTransformer

    tower = VisionTransformer(
        **shape,
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-5),
        act_layer="quick_gelu" if spec.quick_gelu else None,
    )
    if projects:  # CLIP's projection is a matrix without bias; timm's head has one
        tower.head = nn.Linear(spec.vision.width, spec.embed_dim, bias=False)
        nn.init.normal_(tower.head.weight, std=spec.vision.width**-0.5)
    return tower


def build_text_tower(spec: ModelSpec) -> TextTransformer:
    """The causal text tower (LayerNorm eps 1e-5), pooled at the end-of-text token: ids [B, T] to [B, embed_dim]."""
    from open_clip.transformer import QuickGELU, TextTransformer

    text = spec.text
    return TextTransformer(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        output_dim=spec.embed_dim,
        act_layer=QuickGELU if spec.quick_gelu else nn.GELU,
    )


def has_mean_pool(tower: Eva) -> bool:
    """Whether a vision tower pools the mean of its patch tokens through `fc_norm` (a fine-tuned classifier's)."""
    return not isinstance(tower.fc_norm, nn.Identity)


def pool_tokens(tower: Eva, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Tokens [B, 1 + N, D] of `forward_features` to features [B, D], or [B, 2·D] for "cls+gap".

    "gap" passes `fc_norm` where the tower has one and is the plain mean of patch tokens where it has not.
    """
    if pool == "cls":
        return tokens[:, 0]
    mean_patch: torch.Tensor = tower.fc_norm(tokens[:, 1:].mean(dim=1))
    return mean_patch if pool == "gap" else torch.cat([tokens[:, 0], mean_patch], dim=1)
