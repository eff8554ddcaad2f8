"""Loss and mean average precision of one split whose images may show several classes."""

from __future__ import annotations

import warnings

import torch
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision

from probes.metrics import MeanLoss, SplitMeter, without_broken

TRAIN_THRESHOLDS = 200
"""Thresholds of the binned precision on train: its state has one size, whatever the number of images."""


class ClassCounts(Metric):
    """Samples that show each class, [C]."""

    counts: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, targets: torch.Tensor) -> None:
        """Add multi-hot targets [B, C]."""
        self.counts += targets.sum(dim=0)

    def compute(self) -> torch.Tensor:
        """The counts so far."""
        return self.counts


class MultiLabelMeter(SplitMeter):
    """A `SplitMeter` for multi-hot targets: every sample counts once, also over several processes.

    Args:
        num_classes: C.
        thresholds: None for the exact average precision, which keeps all scores; a number for the binned one.
    """

    def __init__(self, num_classes: int, thresholds: int | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.precision = MultilabelAveragePrecision(num_classes, average="none", thresholds=thresholds)
        self.counts = ClassCounts(num_classes)
        self.loss = MeanLoss()

    def update(self, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor | None = None) -> None:
        """Add logits [B, C] and targets bool [B, C]; `loss` is the batch's mean where it is not plain cross-entropy."""
        if loss is None:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets.float())
        self.loss.update(loss.float(), len(targets))
        # In float32 the sigmoids of large logits are equal, and their order is lost.
        self.counts.update(targets)
        self.precision.update(logits.double().sigmoid(), targets.long())

    def compute_and_reset(self) -> dict[str, float]:
        """`loss` (mean over samples) and `mean_ap` (percent, mean over the classes that occur; NaN if none does)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without an image, which the mean leaves out
            precisions = self.precision.compute()  # [C]
        occurring = self.counts.compute() > 0
        values = {"mean_ap": 100 * float(precisions[occurring].mean()), "loss": float(self.loss.compute())}
        self.precision.reset()
        self.counts.reset()
        self.loss.reset()
        return without_broken(values)

    def _metrics(self) -> dict[str, Metric]:
        return {"mean_ap": self.precision, "counts": self.counts, "loss": self.loss}


def build_meter(num_classes: int, *, multi_label: bool, train: bool = False) -> SplitMeter:
    """The meter of a split: accuracy, or for images of several classes mean average precision (on train binned)."""
    if multi_label:
        return MultiLabelMeter(num_classes, TRAIN_THRESHOLDS if train else None)
    return SplitMeter(num_classes)
