"""Losses and mixed targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torchvision.transforms import v2

if TYPE_CHECKING:
    from finetune.sections import AugmentSection


class Mixer:
    """Mixup and cutmix of a batch, one of the two a batch: images [B, 3, H, W], classes [B] to probabilities [B, C].

    Multi-hot bool [B, C] becomes the share of each label, float32 [B, C].
    """

    def __init__(self, augment: AugmentSection, num_classes: int) -> None:
        self.num_classes = num_classes
        ways = []
        if augment.mixup:
            ways.append(v2.MixUp(alpha=augment.mixup, num_classes=num_classes))
        if augment.cutmix:
            ways.append(v2.CutMix(alpha=augment.cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(ways) if ways else None

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images and targets; as they came with nothing to mix or a single image."""
        if self.mix is None or len(images) < 2:
            return images, target
        mixed, probabilities = self.mix(images, target.float() if target.ndim > 1 else target)
        return mixed, probabilities


def classification_losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float,
    class_weights: torch.Tensor | None = None,
    *,
    multi_label: bool = False,
) -> torch.Tensor:
    """Loss of every image of a batch in fp32, [B].

    Weighted losses are not divided by the weights that meet in a batch: a mean over a step divides by its images.

    Args:
        logits: [B, C].
        target: class indices int64 [B], probabilities [B, C] (mixed), or multi-hot bool [B, C].
        label_smoothing: share of the target spread over all classes; of a multi-hot target, over 0 and 1.
        class_weights: [C] or None; of the classes, or with `multi_label` of their positives.
        multi_label: an image may show several classes: `target` is multi-hot, or mixed from it, and is scored by
            binary cross-entropy, the mean over classes.
    """
    logits = logits.float()
    if multi_label or target.dtype == torch.bool:
        smooth = target.float() * (1 - label_smoothing) + label_smoothing / 2
        terms = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=class_weights, reduction="none")
        return terms.mean(dim=1)
    return F.cross_entropy(logits, target, class_weights, label_smoothing=label_smoothing, reduction="none")
