"""The part that a micro-batch takes in a step when none of its images could be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier


def zero_of(model: Classifier, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A zero [] with a gradient of zeros for every trained weight of `forward`, which takes images through the model.

    The other processes wait for this one's gradients, and sharded weights for its forward pass. A blank image goes
    through the model in evaluation mode, so that no running statistic sees it; modes return as they were.
    """
    modes = [(part, part.training) for part in model.modules()]
    side = model.spec.vision.image_size
    model.eval()
    outputs = forward(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    for part, mode in modes:
        part.training = mode
    zero: torch.Tensor = 0.0 * outputs.float().sum()
    return zero
