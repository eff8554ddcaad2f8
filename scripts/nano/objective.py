"""The pre-training losses, and the heads that only training needs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

LAYOUT_GRID = 8
"""Side of the thumbnail that the class token must be able to tell, in cells."""


class TrainingHeads(nn.Module):
    """Dropped after training: a projector for picture-to-picture positives, a word and a layout head."""

    def __init__(self, width: int, words: int, hidden: int = 384, dim: int = 96) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.words = nn.Linear(width, words)
        self.layout = nn.Linear(width, 3 * LAYOUT_GRID**2)


def image_text_loss(
    image: torch.Tensor, text: torch.Tensor, positives: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) with several pictures to a text.

    Args:
        image: unit vectors [B, D]. text: unit vectors [T, D]; the first `positives.max() + 1` are texts of
        the batch, the others negatives. positives: the text of each picture, [B]. scale: inverse
        temperature, [].
    """
    logits = scale * image @ text.t()  # [B, T]
    to_text = F.cross_entropy(logits, positives, label_smoothing=0.05)
    batch_texts = int(positives.max()) + 1
    mask = F.one_hot(positives, batch_texts).t().to(logits.dtype)  # [E, B]
    to_image = -(F.log_softmax(logits[:, :batch_texts].t(), 1) * mask).sum(1) / mask.sum(1)
    return (to_text + to_image.mean()) / 2


def image_image_loss(features: torch.Tensor, positives: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Supervised contrast (Khosla et al., 2020, L_out) of unit vectors [B, D]; equal `positives` attract."""
    logits = features @ features.t() / temperature
    self_mask = torch.eye(len(features), dtype=torch.bool)
    logits = logits.masked_fill(self_mask, -1e4)
    mask = (positives[:, None] == positives[None, :]) & ~self_mask
    log_probability = F.log_softmax(logits, 1)
    return -((log_probability * mask).sum(1) / mask.sum(1)).mean()


def word_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of caption-word logits [B, W] with weighted bags of words [B, W] that sum to one."""
    return -(F.log_softmax(logits, 1) * targets).sum(1).mean()


def layout_loss(predicted: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of predicted thumbnails [B, 3 * 64] of the normalised images [B, 3, H, W].

    Keeps colours and their places linearly readable from the class token, beside what the picture means.
    """
    thumbnails = F.adaptive_avg_pool2d(images, LAYOUT_GRID).flatten(1)
    return F.mse_loss(predicted, thumbnails)
