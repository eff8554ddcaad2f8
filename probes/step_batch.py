"""The images of one optimizer step: its loss is their mean, however they are cut into micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch


@dataclass(frozen=True)
class StepFigures:
    """What the host reads of a step, once."""

    norm: float
    """Of the gradient."""
    images: int
    """That could be read, over all processes."""
    loss: float
    """Summed over them."""


class StepBatch:
    """Makes the gradient of a step that of sum(loss) / B, with B its readable images over all processes.

    A micro-batch's own mean would weigh its images by what else is in it: by their classes' weights, and by how many
    images beside them could be read. B is known only after the last micro-batch, so each is divided by the size that
    all of them have, and `finish` scales the gradient.
    """

    def __init__(self) -> None:
        self._size = self._images = 0
        self._loss: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, images: int, size: int) -> torch.Tensor:
        """What a training step returns for a micro-batch; Lightning divides it by their number and averages processes.

        Args:
            loss: [], the sum over the images.
            images: how many it is the sum of.
            size: images of the micro-batch, the unreadable ones too.
        """
        self._size = self._size or size
        self._images += images
        self._loss = loss.detach().float() if self._loss is None else self._loss + loss.detach().float()
        return loss / self._size

    def finish(self, trainer: pl.Trainer, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, StepFigures]:
        """Scale the step's gradients in place; returns their norm [] on the device, and the figures.

        All processes call it together. It waits for the device once.
        """
        assert self._loss is not None, "a step without a micro-batch"
        planned = self._size * trainer.accumulate_grad_batches * trainer.world_size
        totals = torch.stack([torch.full_like(self._loss, self._images), self._loss])
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        if trainer.world_size > 1 or self._images != planned:
            torch._foreach_mul_(list(gradients), planned / totals[0].clamp(min=1))
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._size, self._images, self._loss = 0, 0, None
        size, images, loss = torch.cat([norm.float().view(1), totals]).tolist()
        return norm, StepFigures(size, round(images), loss)


def loss_scale(trainer: pl.Trainer) -> float:
    """Factor of the loss under fp16, else 1."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
