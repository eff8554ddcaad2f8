"""BatchNorm's running statistics when several processes train one head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn


class SharedRunningStatistics(Callback):
    """Makes the running statistics those that one process reaches on the same micro-batches.

    Each process normalises its own micro-batch. After it, the updates of all processes are applied everywhere, in the
    order of the processes; DistributedDataParallel alone would keep the first process's and drop the rest.
    """

    def __init__(self) -> None:
        self._before: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the statistics [D] from before this process's update; they are the same in all processes."""
        self._before = [statistic.clone() for _, statistic in _statistics(module)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply the updates of all processes one after the other."""
        for (norm, statistic), before in zip(_statistics(module), self._before, strict=True):
            keep = 1 - float(norm.momentum or 0)
            shared = before.clone()
            for own in module.all_gather(statistic):
                shared = keep * shared + (own - keep * before)  # own - keep·before: momentum x batch statistic
            statistic.copy_(shared)
        for norm in _batch_norms(module):
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += trainer.world_size - 1  # this process has counted its own


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]


def _statistics(module: nn.Module) -> Iterator[tuple[nn.BatchNorm1d, torch.Tensor]]:
    for norm in _batch_norms(module):
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            yield norm, statistic
