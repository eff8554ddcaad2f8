"""Accuracy of a classifier through torchmetrics, with k clamped to the number of classes."""

from __future__ import annotations

import torch
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def build_metrics(num_classes: int) -> MetricCollection:
    """`acc1` and `acc5` over samples (micro average), as fractions; k is at most `num_classes`."""
    return MetricCollection(
        {f"acc{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
    )


class SplitMeter(torch.nn.Module):
    """Loss and accuracy of one split: every sample counts once, also over several processes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.accuracy = build_metrics(num_classes)
        self.loss = MeanMetric()

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add logits [B, C] and class indices [B]."""
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        self.loss.update(losses)
        self.accuracy.update(logits, targets)

    def compute_and_reset(self) -> dict[str, float]:
        """`loss` (mean over samples), `acc1`, `acc5` (percent)."""
        values = {name: 100 * float(value) for name, value in self.accuracy.compute().items()}
        values["loss"] = float(self.loss.compute())
        self.accuracy.reset()
        self.loss.reset()
        return values
