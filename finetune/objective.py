"""What a fine-tune minimises, as the losses of one micro-batch's images."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from finetune.no_images import zero_of
from finetune.targets import Mixer, classification_losses
from probes.batch_norm import settled_if_single

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.sections import FinetuneRecipe


class Scored(NamedTuple):
    """What a micro-batch adds to its step, and what is logged of it."""

    total: torch.Tensor
    """Sum of losses with a gradient, []."""
    losses: torch.Tensor
    """Of n images that could be read, [n]."""
    logits: torch.Tensor
    """Of these, [n, C]."""
    target: torch.Tensor
    """Of these, classes int64 [n] or multi-hot bool [n, C]."""


class ClassObjective(nn.Module):
    """Cross-entropy of the classifier, smoothed, weighted and of mixed images as a recipe says.

    Args:
        recipe: regularisation and augmentation are read from it.
        num_classes: C.
        class_weights: [C] or None.
        multi_label: images may show several classes: binary cross-entropy.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self, recipe: FinetuneRecipe, num_classes: int, class_weights: torch.Tensor | None, *, multi_label: bool
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mixer = Mixer(recipe.augment, num_classes)
        self.smoothing, self.multi_label = recipe.regularisation.label_smoothing, multi_label

    def forward(self, model: Classifier, images: torch.Tensor, target: torch.Tensor) -> Scored:
        """Losses of images [B, 3, H, W]; with none a zero that lets this process take part in the step."""
        if not len(target):
            empty = torch.empty(0, device=target.device)
            return Scored(zero_of(model, model), empty, empty, target)
        images, mixed = self.mixer(images, target)
        with settled_if_single(model.head, len(target)):
            logits = model(images)
        losses = classification_losses(logits, mixed, self.smoothing, self.class_weights, multi_label=self.multi_label)
        return Scored(losses.sum(), losses.detach(), logits.detach(), target)
