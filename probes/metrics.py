"""Accuracy of a classifier through torchmetrics, with k clamped to the number of classes."""

from __future__ import annotations

import math

import torch
from torch.distributed import all_reduce, get_rank, is_initialized
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def build_metrics(num_classes: int) -> MetricCollection:
    """`acc1` and `acc5` over samples (micro average), as fractions; k is at most `num_classes`.

    Neither their checks nor their grouping, both of which wait for the device, are of use to a training step.
    """
    kinds = {k: min(k, num_classes) for k in (1, 5)}
    metrics: dict[str, Metric | MetricCollection] = {
        f"acc{k}": MulticlassAccuracy(num_classes, top_k=top_k, average="micro", validate_args=False)
        for k, top_k in kinds.items()
    }
    return MetricCollection(metrics, compute_groups=False)


class LossMean(Metric):
    """Mean of the samples' losses. torchmetrics' own leaves NaN out, and waits for the device at every update.

    Args:
        leave_out: losses that are not finite have no part in the mean, as those of training steps that were skipped;
            else one of them makes the mean what it is.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, *, leave_out: bool = False) -> None:
        super().__init__()
        self.leave_out = leave_out
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, losses: torch.Tensor) -> None:
        """Add the losses [B] of some samples."""
        known = torch.isfinite(losses) if self.leave_out else torch.ones_like(losses, dtype=torch.bool)
        self.total += losses.float().where(known, 0.0).sum()
        self.count += known.sum()

    def compute(self) -> torch.Tensor:
        """The mean so far, []."""
        return self.total / self.count


class SplitMeter(torch.nn.Module):
    """Loss and accuracy of one split: every sample counts once, also over several processes.

    Where a sample's logits are not finite neither is the loss, and then there is no accuracy either: all are NaN. On
    train such steps may have been skipped, and are left out of the loss.
    """

    def __init__(self, num_classes: int, *, train: bool = False) -> None:
        super().__init__()
        self.accuracy = build_metrics(num_classes)
        self.loss = LossMean(leave_out=train)

    def update(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor | None = None) -> None:
        """Add logits [B, C] and class indices [B]; `losses` [B] of the samples where not plain cross-entropy."""
        if losses is None:
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        self.loss.update(losses)
        self.accuracy.update(logits, targets)

    def totals(self) -> dict[str, dict[str, torch.Tensor]]:
        """Sums so far over all processes, for a checkpoint inside an epoch; all of them call this together."""
        return {
            name: {key: _sum_over_processes(torch.as_tensor(value)) for key, value in metric.metric_state.items()}
            for name, metric in self._metrics().items()
        }

    def load_totals(self, totals: dict[str, dict[str, torch.Tensor]]) -> None:
        """Continue from `totals()`: the first process takes them over, the others begin at 0."""
        first = not is_initialized() or get_rank() == 0
        for name, metric in self._metrics().items():
            for key, value in totals[name].items():
                setattr(metric, key, (value if first else torch.zeros_like(value)).to(metric.device))
            metric._update_count = 1  # else compute() warns that nothing was added

    def _metrics(self) -> dict[str, Metric]:
        return {**dict(self.accuracy.items(keep_base=True, copy_state=False)), "loss": self.loss}

    def compute_and_reset(self) -> dict[str, float]:
        """`loss` (mean over samples), `acc1`, `acc5` (percent)."""
        values = {name: 100 * float(value) for name, value in self.accuracy.compute().items()}
        values = without_broken({**values, "loss": float(self.loss.compute())})
        self.accuracy.reset()
        self.loss.reset()
        return values


def without_broken(values: dict[str, float]) -> dict[str, float]:
    """The values, or NaN in place of every one of them where the loss is not finite."""
    return values if math.isfinite(values["loss"]) else dict.fromkeys(values, math.nan)


def _sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    total = value.clone()
    if is_initialized():
        all_reduce(total)
    return total
