"""Classification heads on features [B, D]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from eva_clip.models import EvaCLIP


def build_head(kind: str, feature_dim: int, num_classes: int) -> nn.Sequential:
    """A head from features [B, feature_dim] to logits [B, num_classes], float32.

    "bn_linear" is the published one: BatchNorm1d(affine=False, eps=1e-6), then Linear with weights from a normal
    distribution of standard deviation 0.01 (not truncated) and bias 0. "linear" leaves the BatchNorm out.

    Raises:
        ValueError: unknown kind.
    """
    linear = nn.Linear(feature_dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    if kind == "linear":
        return nn.Sequential(linear)
    if kind == "bn_linear":
        return nn.Sequential(nn.BatchNorm1d(feature_dim, affine=False, eps=1e-6), linear)
    raise ValueError(f"unknown head {kind!r}; expected bn_linear or linear")


@torch.no_grad()
def build_zero_shot_weights(model: EvaCLIP, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Class embeddings from the text tower, averaged over prompt templates.

    Args:
        model: both towers.
        class_names: one text per class.
        templates: prompts with `{}` where the name goes.

    Returns:
        float32 [classes, embed_dim], rows of unit length: the mean of unit-length prompts, scaled to unit length.
    """
    from eva_clip.tokenizer import tokenize

    rows = []
    for name in class_names:
        tokens = tokenize([template.format(name) for template in templates], model.spec.text.context_length)
        prompts = model.encode_text(tokens.to(model.logit_scale.device)).float()
        prompts = nn.functional.normalize(prompts, dim=-1)
        rows.append(nn.functional.normalize(prompts.mean(dim=0), dim=0))
    return torch.stack(rows)
