"""Loss and mean average precision of one split whose images may show several classes."""

from __future__ import annotations

import warnings

import torch
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision

from probes.metrics import LossMean, SplitMeter, without_broken

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


class BinnedPrecision(MultilabelAveragePrecision):
    """torchmetrics' average precision at evenly spread thresholds, without its waits for the device at every update."""

    confmat: torch.Tensor

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add scores [B, C] in [0, 1] and targets int64 [B, C].

        A score is counted once, at the highest threshold that it reaches; sums from the top down give those of all.
        """
        assert isinstance(self.thresholds, torch.Tensor)
        thresholds, classes = self.thresholds.to(preds.dtype), preds.shape[1]
        reached = torch.searchsorted(thresholds, preds.contiguous(), right=True)  # [B, C], thresholds at or below
        counts = self.confmat.new_zeros(len(thresholds) + 1, classes, 2)  # by thresholds reached, class, target
        cell = (reached * classes + torch.arange(classes, device=preds.device)) * 2 + target
        counts.view(-1).scatter_add_(0, cell.flatten(), torch.ones_like(cell, dtype=counts.dtype).flatten())
        positive = counts.flip(0).cumsum(0).flip(0)[1:]  # [T, C, 2], said to show the class
        self.confmat += torch.stack([counts.sum(0) - positive, positive], dim=3)


class MultiLabelMeter(SplitMeter):
    """A `SplitMeter` for multi-hot targets: every sample counts once, also over several processes.

    Args:
        num_classes: C.
        thresholds: None for the exact average precision, which keeps all scores; a number for the binned one.
        train: as of `SplitMeter`.
    """

    def __init__(self, num_classes: int, thresholds: int | None = None, *, train: bool = False) -> None:
        torch.nn.Module.__init__(self)
        kind = MultilabelAveragePrecision if thresholds is None else BinnedPrecision
        self.precision = kind(num_classes, average="none", thresholds=thresholds, validate_args=False)
        self.counts = ClassCounts(num_classes)
        self.loss = LossMean(leave_out=train)

    def update(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor | None = None) -> None:
        """Add logits [B, C] and targets bool [B, C]; `losses` [B] of the samples where not plain cross-entropy."""
        if losses is None:
            terms = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), targets.float(), reduction="none"
            )
            losses = terms.mean(dim=1)
        self.loss.update(losses)
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
        return MultiLabelMeter(num_classes, TRAIN_THRESHOLDS if train else None, train=train)
    return SplitMeter(num_classes, train=train)
