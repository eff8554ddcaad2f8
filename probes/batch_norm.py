"""BatchNorm's running statistics when several processes train one head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn


@contextlib.contextmanager
def settled_if_single(module: nn.Module, rows: int) -> Iterator[None]:
    """For the length of a `with` block normalise fewer than two rows, which vary in nothing, by running statistics.

    Those then stay as they are. Statistics over all processes (SyncBatchNorm) are left alone.
    """
    norms = [norm for norm in _batch_norms(module) if norm.training and rows < 2]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class SharedRunningStatistics(Callback):
    """Makes the running statistics those that one process reaches on the same micro-batches.

    Each process normalises its own micro-batch. After it, the updates of all processes are applied everywhere, in the
    order of the processes; DistributedDataParallel alone would keep the first process's and drop the rest. A process
    whose micro-batch was too small for statistics of its own has no update.
    """

    def __init__(self) -> None:
        self._before: list[torch.Tensor] = []
        self._counted: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the statistics [D] from before this process's update; they are the same in all processes."""
        self._before = [statistic.clone() for _, statistic in _statistics(module)]
        self._counted = [_count(norm).clone() for norm in _batch_norms(module)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply the updates of all processes one after the other."""
        norms = _batch_norms(module)
        updated = {
            norm: torch.as_tensor(module.all_gather(_count(norm) - counted))  # [processes] of 0 and 1
            for norm, counted in zip(norms, self._counted, strict=True)
        }
        for (norm, statistic), before in zip(_statistics(module), self._before, strict=True):
            keep = 1 - float(norm.momentum or 0)
            shared = before.clone()
            for own, has in zip(module.all_gather(statistic), updated[norm], strict=True):
                # own - keep·before: momentum x batch statistic
                shared = torch.where(has > 0, keep * shared + (own - keep * before), shared)
            statistic.copy_(shared)
        for norm, counted in zip(norms, self._counted, strict=True):
            _count(norm).copy_(counted + updated[norm].sum())


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]


def _count(norm: nn.BatchNorm1d) -> torch.Tensor:
    """Micro-batches that the statistics have seen, []."""
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


def _statistics(module: nn.Module) -> Iterator[tuple[nn.BatchNorm1d, torch.Tensor]]:
    for norm in _batch_norms(module):
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            yield norm, statistic
