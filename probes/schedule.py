"""The published learning-rate schedule: linear warm-up, then a half cosine, one value per optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def warmup_cosine(
    peak: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float
) -> NDArray[np.float64]:
    """Learning rate of every step.

    Warm-up is `linspace(0, peak, warmup_steps)` with both ends, so the first step has rate 0 and the peak occurs twice;
    then `final + 0.5·(peak - final)·(1 + cos(pi·i/n))` for i = 0 … n-1 over the n remaining steps.

    Args:
        peak: highest rate.
        final: rate that the cosine tends to.
        epochs: passes over the data.
        steps_per_epoch: optimizer steps of one pass.
        warmup_epochs: passes of warm-up, at most `epochs`; `int(warmup_epochs * steps_per_epoch)` steps.

    Returns:
        float64 [epochs * steps_per_epoch].

    Raises:
        ValueError: no steps, or a warm-up longer than the run.
    """
    steps = epochs * steps_per_epoch
    warmup_steps = int(warmup_epochs * steps_per_epoch)
    if steps < 1 or not 0 <= warmup_steps <= steps:
        raise ValueError(
            f"{epochs} epochs of {steps_per_epoch} steps with {warmup_epochs} of warm-up is no schedule; expected at "
            "least one step and a warm-up no longer than the run"
        )
    remaining = steps - warmup_steps
    position = np.arange(remaining) / max(remaining, 1)
    cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * position))
    return np.concatenate([np.linspace(0, peak, warmup_steps), cosine])


def epoch_means(schedule: NDArray[np.float64], epochs: int) -> list[float]:
    """Mean rate of every epoch, as the published logs' `train_lr`; `schedule` is [epochs * steps_per_epoch]."""
    return [float(mean) for mean in schedule.reshape(epochs, -1).mean(axis=1)]
