"""Losses of stacked heads and their derivatives by the logits, without autograd.

Shapes: H heads, C classes, B samples. The class dimension is not the last, so that softmax works across samples side by
side: for few classes that is several times faster than along a short last dimension.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cross_entropy_errors(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax cross-entropy of every head, its mean over the samples.

    Args:
        logits: [H, C, B].
        targets: class indices [B].
        class_weights: [C] or None; multiplies the terms of each class. They are still divided by B, not by the weights
            that happen to meet in a batch.

    Returns:
        The derivative of each head's loss by its logits [H, C, B], and the losses [H].
    """
    classes, samples = logits.shape[1:]
    shares = torch.full((samples,), 1 / samples, dtype=logits.dtype, device=logits.device)
    if class_weights is not None:
        shares *= class_weights[targets]
    highest = logits.amax(1)  # [H, B]
    of_target = logits.gather(1, targets.expand(len(logits), 1, samples))[:, 0]  # [H, B]
    probabilities = torch.softmax(logits, 1)
    # The greatest probability is 1 / sum(exp(logits - highest)): the loss without a second pass of exponentials, and
    # finite where the target's own probability has run down to 0.
    losses = torch.mv(highest - of_target - probabilities.amax(1).log_(), shares)
    wanted = shares * F.one_hot(targets, classes).T  # [C, B]
    return probabilities.mul_(shares).sub_(wanted), losses


def binary_errors(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of every head over samples and classes, for targets with any number of classes a sample.

    Args:
        logits: [H, C, B].
        targets: [B, C] of 0 and 1.
        class_weights: [C] or None; multiplies the terms of each class, as `weight` does in
            `torch.nn.functional.binary_cross_entropy_with_logits`.

    Returns:
        The derivative of each head's loss by its logits [H, C, B], and the losses [H].
    """
    wanted = targets.T.to(logits.dtype)  # [C, B]
    shares = torch.full_like(wanted, 1 / wanted.numel())
    if class_weights is not None:
        shares *= class_weights[:, None]
    terms = F.binary_cross_entropy_with_logits(logits, wanted.expand_as(logits), reduction="none")
    losses = torch.mv(terms.flatten(1), shares.flatten())
    return torch.sigmoid(logits).sub_(wanted).mul_(shares), losses


LOSSES = {"cross_entropy": cross_entropy_errors, "bce": binary_errors}
"""By name."""
