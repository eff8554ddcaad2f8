"""`LinearProbe`: a head trained on frozen features, as a LightningModule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.nn import functional as F

from eva_clip.classifier import without_autocast
from probes.batch_norm import settled_if_single
from probes.metrics import SplitMeter
from probes.multi_label_meter import build_meter
from probes.optim import build_optimizer
from probes.step_batch import StepBatch, loss_scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eva_clip.encoder import VisionEncoder
    from probes.sections import OptimizerSection

Batch = dict[str, Any]


class LinearProbe(LightningModule):
    """Trains `head` on features; batches hold `features` [B, D], or `image` [B, 3, H, W] when there is an encoder.

    With `multi_label` targets are bool [B, C], the loss is binary cross-entropy, and mean average precision selects.
    After every epoch `history` grows by one row with the columns of the published logs, and `selected` holds the
    head that scored best on the selection split so far (None when nothing selects).
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        head: nn.Module,
        *,
        optimizer: OptimizerSection,
        schedule: NDArray[np.float64],
        num_classes: int,
        evaluation_names: Sequence[str],
        class_weights: torch.Tensor | None = None,
        multi_label: bool = False,
        encoder: VisionEncoder | None = None,
        encoder_sha256: str = "",
        on_row: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.encoder = encoder
        self.encoder_sha256 = encoder_sha256
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.optimizer_section = optimizer
        self.schedule = schedule
        self.evaluation_names = list(evaluation_names)
        self.on_row = on_row
        self.multi_label = multi_label
        self.meters = nn.ModuleDict(
            {
                f"{name}_meter": build_meter(num_classes, multi_label=multi_label, train=name == "train")
                for name in ("train", *evaluation_names)
            }
        )
        self.history: list[dict[str, float]] = []
        self.selected: dict[str, Any] | None = None
        self._rates: list[float] = []
        self._gradient_norms: list[float] = []
        self._step = StepBatch()
        self.strict_loading = False  # checkpoints hold the head alone

    @property
    def selection_name(self) -> str | None:
        """The split that selects, or None: "test" never does."""
        return next((name for name in self.evaluation_names if name != "test"), None)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 [B, classes]. The head computes in fp32, whatever the encoder does."""
        if "features" in batch:
            features = batch["features"]
        else:
            assert self.encoder is not None
            image = batch["image"]
            features = self.encoder(image) if len(image) else image.new_empty(0, self.encoder.feature_dim)
        with without_autocast(features.device):  # Lightning's, of fp16
            logits: torch.Tensor = self.head(features.float())
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        """Loss of one micro-batch: its share of the step's mean; 0 when every image of it was unreadable."""
        self._note_skipped("train", batch)
        target = batch["target"]
        with settled_if_single(self.head, len(target)):
            logits = self(batch)
        losses = self._losses(logits.float(), target) if len(target) else logits.sum(dim=1)
        if len(target):
            self._meter("train").update(logits.detach(), target, losses.detach())
        return self._step.add(losses.sum(), len(target), len(target) + len(batch.get("skipped") or ()))

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the evaluation split number `dataloader_idx`."""
        name = self.evaluation_names[dataloader_idx]
        self._note_skipped(name, batch)
        if len(batch["target"]):
            self._meter(name).update(self(batch), batch["target"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient (unscaled) that of the step's images, and note its norm and the rate in force."""
        self._rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
        _, figures = self._step.finish(self.trainer, gradients)
        self._gradient_norms.append(figures.norm)
        if not math.isfinite(figures.loss):
            raise ValueError(
                f"the training loss is {figures.loss} in epoch {self.current_epoch}; lower optimizer.lr, or use "
                "trainer.precision=fp32"
            )
        if not figures.images:  # nothing to learn from: no decay, no momentum
            self.head.zero_grad()

    def on_train_epoch_end(self) -> None:
        """Close the epoch: one row of history, and the selected head brought up to date."""
        train = self._meter("train").compute_and_reset()
        row = {
            "train_lr": math.fsum(self._rates) / len(self._rates),
            "train_min_lr": math.fsum(self._rates) / len(self._rates),
            "train_loss": train["loss"],
            **({"train_mean_ap": train["mean_ap"]} if self.multi_label else {"train_class_acc": train["acc1"] / 100}),
            "train_loss_scale": loss_scale(self.trainer),
            "train_grad_norm": math.fsum(self._gradient_norms) / len(self._gradient_norms),
        }
        for name in self.evaluation_names:
            row |= {f"{name}_{key}": value for key, value in self._meter(name).compute_and_reset().items()}
        row |= {
            "epoch": self.current_epoch,
            "n_parameters": sum(p.numel() for p in self.head.parameters() if p.requires_grad),
        }
        self._rates, self._gradient_norms = [], []
        self.history.append(row)
        self._select(row)
        figures = {key: float(value) for key, value in row.items() if key not in ("epoch", "n_parameters")}
        self.log_dict(figures, rank_zero_only=True)  # the meters have summed over processes
        if self.on_row is not None and self.trainer.is_global_zero:
            self.on_row(row)

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer; the schedule's value of every step is written into the groups' `lr`."""
        optimizer = build_optimizer(self.head.parameters(), self.optimizer_section)
        peak, last = self.optimizer_section.lr, len(self.schedule) - 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            # float: a NumPy scalar in the optimizer's state would keep the checkpoint from being loaded as mere data
            optimizer,
            lambda step: float(self.schedule[min(step, last)]) / peak if peak else 0.0,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head and the encoder's hash, never the encoder."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key.startswith("head.")}
        checkpoint["encoder_sha256"] = self.encoder_sha256
        checkpoint["history"] = self.history
        checkpoint["selected"] = self.selected

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue history and selection; refuse a head that was trained on another encoder."""
        if checkpoint["encoder_sha256"] != self.encoder_sha256:
            raise ValueError(
                f"the checkpoint's head belongs to encoder {checkpoint['encoder_sha256'][:12]}, this run's is "
                f"{self.encoder_sha256[:12]}; restore the weights it was started with, or start a new run"
            )
        self.history = checkpoint["history"]
        self.selected = checkpoint["selected"]

    def load_reported_head(self) -> None:
        """Put the selected epoch's weights into `head`; without a selection split the last epoch's stay."""
        if self.selected is not None:
            self.head.load_state_dict(self.selected["head"])

    def _select(self, row: dict[str, float]) -> None:
        if self.selection_name is None:
            return
        score = row[f"{self.selection_name}_{'mean_ap' if self.multi_label else 'acc1'}"]
        if math.isnan(score):  # the epoch diverged
            return
        if self.selected is None or score > self.selected["score"]:
            state = {key: value.detach().cpu() for key, value in self.head.state_dict().items()}
            self.selected = {"epoch": int(row["epoch"]), "score": score, "head": copy.deepcopy(state)}

    def _losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Per image [B]: cross-entropy of indices [B], or the classes' mean binary cross-entropy of bool [B, C]."""
        if self.multi_label:
            weights = self.class_weights
            terms = F.binary_cross_entropy_with_logits(logits, target.float(), pos_weight=weights, reduction="none")
            return terms.mean(dim=1)
        return F.cross_entropy(logits, target, weight=self.class_weights, reduction="none")

    def _note_skipped(self, name: str, batch: Batch) -> None:
        if batch.get("skipped"):
            self.trainer.datamodule.note_skipped(name, batch)  # type: ignore[attr-defined]

    def _meter(self, name: str) -> SplitMeter:
        meter = self.meters[f"{name}_meter"]
        assert isinstance(meter, SplitMeter)
        return meter
