from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
OPTIONS = {
    "eva01": {},
    "eva02": {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    "eva02_post_norm": {"use_post_norm": True},
}


@pytest.fixture
def build_tower() -> Callable[..., nn.Module]:
    """timm's own towers of every family, four blocks deep."""

    def build(family: str = "eva01", **options: object) -> nn.Module:
        torch.manual_seed(0)
        if family == "clip":
            return VisionTransformer(**SHAPE, pre_norm=True, **options)
        return Eva(**SHAPE, **OPTIONS[family], **options)

    return build
