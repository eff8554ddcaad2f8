"""Lightning's Trainer as every run uses it: it restores and writes nothing outside of the run folder."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from probes.checkpoints import Terminated, newest_readable
from probes.progress import is_terminal
from probes.scoring import predict_logits

if TYPE_CHECKING:
    from probes.runs import RunFolder


def build_trainer(folder: Path | None, callbacks: list[Callback], **options: Any) -> pl.Trainer:
    """A Trainer for a run folder; without one nothing is kept.

    In a SLURM job Lightning would write `hpc_ckpt_1.ckpt` into the Trainer's folder when the job is warned, and every
    later Trainer of that folder would silently continue it, whatever it trains. So nothing is requeued by Lightning
    (`KeepCheckpoints` does it), and the folder is the run's own, or where there is no run, none.

    Args:
        folder: of the run.
        callbacks: beside the progress bar.
        options: of the Trainer.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # These concern what this code sets on purpose.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    show_bar = folder is not None and is_terminal()
    # torchrun goes first also inside a SLURM job, as Lightning has it.
    on_slurm = not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()
    return pl.Trainer(
        default_root_dir=folder or os.devnull,
        plugins=[SLURMEnvironment(auto_requeue=False)] if on_slurm else None,
        logger=TensorBoardLogger(folder, name="", version="tensorboard") if folder else False,
        callbacks=[*callbacks, *([RichProgressBar()] if show_bar else [])],
        enable_checkpointing=folder is not None,
        enable_progress_bar=show_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


def find_checkpoint(run: RunFolder | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, if it is resumed and has one, and a sentence on each passed over.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    if run is None or not run.resumed:
        return None, []
    return newest_readable(run.path / "checkpoints")


def run_training(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Path | None, **data: Any) -> None:
    """`trainer.fit` on loaders or a data module, from a checkpoint on if there is one; the module stays on its device.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
        Terminated: a signal asked to stop.
    """
    try:
        trainer.fit(module, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True, **data)
    except SystemExit as stop:
        if trainer.interrupted and not isinstance(stop, Terminated):  # Lightning turns Ctrl-C into a silent exit
            raise KeyboardInterrupt from stop
        raise
    module.to(trainer.strategy.root_device)  # Lightning has moved it into main memory; there is scoring still to do


def predict_split(
    trainer: pl.Trainer, model: torch.nn.Module, batches: Any, entry: str | None = None, *, every_pass: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`predict_logits` on the trainer's devices, in the precision that its validation has."""
    with trainer.precision_plugin.val_step_context():
        return predict_logits(model, batches, trainer.strategy.root_device, entry, every_pass=every_pass)
