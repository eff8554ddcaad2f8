"""Weights of classes in a loss."""

from __future__ import annotations

import torch


def balanced_weights(counts: torch.Tensor) -> torch.Tensor:
    """Weight of each class, N / (C · count), from counts [C]; 0 for a class without images."""
    present = counts.clamp(min=1).float()
    return torch.where(counts > 0, counts.sum() / (len(counts) * present), torch.zeros_like(present))


def positive_weights(counts: torch.Tensor, samples: int) -> torch.Tensor:
    """Weight of the positives of each class in a binary cross-entropy, max(N - count, 1) / count; 1 without images.

    Args:
        counts: [C] samples that show each class.
        samples: N.
    """
    present = counts.clamp(min=1).float()
    return torch.where(counts > 0, (samples - counts).clamp(min=1) / present, torch.ones_like(present))
