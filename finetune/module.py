"""`FinetuneModule`: a classifier whose encoder is trained, as a LightningModule."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from finetune.contrastive import TextHeads, texts_of
from finetune.contrastive_step import ContrastiveStep
from finetune.ema import WeightAverage
from finetune.layer_decay import build_param_groups
from finetune.objective import ClassObjective
from finetune.optim import build_optimizer
from finetune.resume import convert_position
from finetune.sharding import EveryPass, clear_gradients, is_sharded, shard
from probes.metrics import SplitMeter
from probes.multi_label_meter import build_meter
from probes.sampling import seeded_generator
from probes.step_batch import StepBatch, loss_scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eva_clip.classifier import Classifier
    from finetune.sections import FinetuneRecipe

Batch = dict[str, Any]


class FinetuneModule(LightningModule):
    """Trains `model` as a recipe says, and scores it raw and averaged after every epoch.

    `history` grows by one row an epoch with the columns of the published logs, and `train_data_wait`: the share of the
    epoch's training time in which the device waited for batches. All randomness of a step (dropped paths,
    mixing) is drawn from (seed, epoch, batch, process), so that a resumed run repeats it.

    Args:
        model: with what is not trained already frozen.
        recipe: optimizer, regularisation, augmentation and average are read from it.
        schedule: factor of the peak learning rate of every step, float64 [steps].
        evaluation_names: splits that are scored, in the order of the validation loaders.
        class_weights: [C] or None.
        multi_label: images may show several classes: binary cross-entropy, and mean average precision as the score.
        on_row: called with every epoch's row.
        on_selected: called with the weights' name ("raw", "ema") when they are the best on the selection split so far.
        on_non_finite: called with what went wrong and the split positions of the step's images.
    """

    def __init__(
        self,
        model: Classifier,
        recipe: FinetuneRecipe,
        schedule: NDArray[np.float64],
        evaluation_names: Sequence[str],
        *,
        class_weights: torch.Tensor | None = None,
        multi_label: bool = False,
        on_row: Callable[[dict[str, float]], None] | None = None,
        on_selected: Callable[[str], None] | None = None,
        on_non_finite: Callable[[str, list[int]], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.schedule = schedule
        self.evaluation_names = list(evaluation_names)
        self.multi_label = multi_label
        self.on_row, self.on_selected, self.on_non_finite = on_row, on_selected, on_non_finite
        self.objective = ClassObjective(recipe, model.num_classes, class_weights, multi_label=multi_label)
        self.ema: WeightAverage | None = None
        self._ema_state: dict[str, Any] | None = None
        names = ["train", *evaluation_names]
        names += [f"ema_{name}" for name in evaluation_names if recipe.ema.decay is not None]
        self.meters = nn.ModuleDict(
            {
                f"{name}_meter": build_meter(model.num_classes, multi_label=multi_label, train=name == "train")
                for name in names
            }
        )
        self.history: list[dict[str, float]] = []
        self.selected: dict[str, Any] | None = None
        self._steps: list[list[float]] = []  # of this epoch: highest lr, lowest lr, gradient norm
        self._began = self._ready = self._waited = 0.0  # seconds
        self._text_heads = TextHeads()
        self._step = StepBatch()
        texts = texts_of(model)
        self._contrast = ContrastiveStep(model, texts) if texts is not None else None
        self._images: list[torch.Tensor] = []  # positions of the images of the step being accumulated

    @property
    def selection_name(self) -> str | None:
        """The split that selects, or None: "test" never does."""
        return next((name for name in self.evaluation_names if name != "test"), None)

    def configure_model(self) -> None:
        """Shard the model where the recipe's strategy asks for it; Lightning calls this more than once."""
        if self.recipe.trainer.strategy == "fsdp2" and not is_sharded(self.model):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"], self.recipe.trainer.precision)

    def on_fit_start(self) -> None:
        """Start the average once weights are where they are trained, or continue a checkpoint's."""
        decay = self.recipe.ema.decay
        if decay is not None:
            self.ema = WeightAverage(self.model, decay)
            if self._ema_state is not None:
                self.ema.load_state_dict(self._ema_state)
                self._ema_state = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FinetuneModule:
        """Move the average along; it is no buffer, which DistributedDataParallel would send around at every step."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.ema is not None:
            self.ema.move(fn)
        return self

    def on_train_epoch_start(self) -> None:
        """Start the clock of waiting for batches."""
        self._began = self._ready = time.perf_counter()
        self._waited = 0.0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """From here on the next batch is waited for."""
        self._ready = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw this batch's randomness from its own seed."""
        self._waited += time.perf_counter() - self._ready
        generator = seeded_generator(self.recipe.run.seed, self.current_epoch, batch_idx, self.global_rank, 0xF17E)
        torch.manual_seed(generator.initial_seed())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, H, W] to logits [B, C]."""
        logits: torch.Tensor = self.model(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Loss of one micro-batch: its share of the step's. It does not wait for the device."""
        self._note_skipped("train", batch)
        self._images.append(batch["index"])
        images, target = batch["image"], batch["target"]
        size = len(target) + len(batch.get("skipped") or ())
        if self._contrast is not None:
            parts, place = self.trainer.accumulate_grad_batches, (self.global_rank, self.trainer.world_size)
            scored = self._contrast.score(images, target, size, batch_idx % parts, parts, *place)
        else:
            scored = self.objective(self.model, images, target)
        if len(scored.target):
            self._meter("train").update(scored.logits, scored.target, scored.losses)
        return self._step.add(scored.total, len(target), size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient (unscaled) that of the step's images, note rates and norm, and clip.

        A gradient that is not finite, or of no image, is dropped: parameters without one are left alone by the
        optimizer, with no decay and no momentum.
        """
        norm, figures = self._step.finish(self.trainer, [p.grad for p in self.model.parameters() if p.grad is not None])
        rates = [group["lr"] for group in optimizer.param_groups]
        self._steps.append([max(rates), min(rates), figures.norm])
        clip, finite = self.recipe.optimizer.clip_grad, math.isfinite(figures.loss)
        if finite and not math.isfinite(figures.norm) and loss_scale(self.trainer) != 1.0:
            return  # an overflow is expected, and the scaler skips the step
        if not (finite and math.isfinite(figures.norm)):
            self._handle_non_finite(f"gradient norm {figures.norm}" if finite else f"loss {figures.loss}")
        elif figures.images:
            if clip:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
            return
        self.model.zero_grad()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average.

        Gradients go at once: Lightning keeps them until the next backward pass, through the forward pass that needs
        the memory.
        """
        super().optimizer_step(*args, **kwargs)
        clear_gradients(self.trainer.strategy.model or self.model)
        self._images = []
        if self.ema is not None:
            self.ema.update(self.model)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: the step before has done it."""

    def on_validation_start(self) -> None:
        """Heads made of texts belong to the weights of now."""
        self._text_heads.clear()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of the evaluation split number `dataloader_idx`, with raw and with averaged weights."""
        name = self.evaluation_names[dataloader_idx]
        self._note_skipped(name, batch)
        empty, sharded = not len(batch["target"]), is_sharded(self.model)
        if empty and not sharded:
            return
        model = EveryPass(self.model, self.model.spec.vision.image_size) if sharded else self
        for prefix, weights in self._weight_sets().items():
            with weights:
                self._text_heads.put(self, prefix)
                logits = model(batch["image"])
                if not empty:
                    self._meter(prefix + name).update(logits, batch["target"])

    def on_train_epoch_end(self) -> None:
        """Close the epoch: one row of history, and selection."""
        train = self._meter("train").compute_and_reset()
        highest, lowest, norms = zip(*self._steps, strict=True)
        finite = [norm for norm in norms if math.isfinite(norm)]
        row = {
            "train_lr": math.fsum(highest) / len(highest),
            "train_min_lr": math.fsum(lowest) / len(lowest),
            "train_loss": train["loss"],
            **({"train_mean_ap": train["mean_ap"]} if self.multi_label else {"train_class_acc": train["acc1"] / 100}),
            "train_loss_scale": loss_scale(self.trainer),
            "train_weight_decay": self.recipe.optimizer.weight_decay,
            "train_grad_norm": math.fsum(finite) / max(len(finite), 1),
            "train_data_wait": self._waited / max(self._ready - self._began, 1e-9),
        }
        for prefix in self._weight_sets():
            for name in self.evaluation_names:
                scores = self._meter(prefix + name).compute_and_reset()
                row |= {f"{prefix}{name}_{key}": value for key, value in scores.items()}
        row |= {"epoch": self.current_epoch, "n_parameters": sum(p.numel() for p in self.model.parameters())}
        self._steps = []
        self.history.append(row)
        self._select(row)
        figures = {key: float(value) for key, value in row.items() if key not in ("epoch", "n_parameters")}
        self.log_dict(figures, rank_zero_only=True)  # the meters have summed over processes
        if self.on_row is not None and self.trainer.is_global_zero:
            self.on_row(row)

    def configure_optimizers(self) -> Any:
        """Layer-decayed groups; the schedule's factor of every step is applied to each group's own rate."""
        section = self.recipe.optimizer
        groups = build_param_groups(self.model, section.lr, section.weight_decay, section.layer_decay)
        optimizer = build_optimizer(groups, section, fused=self.recipe.trainer.precision != "fp16")
        last = len(self.schedule) - 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(self.schedule[min(step, last)]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not: the average, the history, and the part of the epoch that is done."""
        checkpoint["finetune"] = {
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "history": self.history,
            "selected": self.selected,
            "steps": self._steps,
            "train_meter": self._meter("train").totals(),
            "accumulate": self.trainer.accumulate_grad_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        convert_position(checkpoint, self.trainer.accumulate_grad_batches)
        state = checkpoint["finetune"]
        self._ema_state = state["ema"]
        if self.ema is not None:  # a sharding strategy restores after `on_fit_start`
            self.on_fit_start()
        self.history, self.selected, self._steps = state["history"], state["selected"], state["steps"]
        self._meter("train").load_totals(state["train_meter"])

    def _weight_sets(self) -> dict[str, Any]:
        """Prefix of the columns to a context in which the model has those weights."""
        sets: dict[str, Any] = {"": contextlib.nullcontext()}
        if self.ema is not None:
            sets["ema_"] = self.ema.applied(self.model)
        return sets

    def _select(self, row: dict[str, float]) -> None:
        name = self.selection_name
        if name is None:
            return
        for prefix in self._weight_sets():
            score = row[f"{prefix}{name}_{'mean_ap' if self.multi_label else 'acc1'}"]
            if math.isnan(score):  # the epoch diverged
                continue
            if self.selected is None or score > self.selected["score"]:
                weights = prefix.removesuffix("_") or "raw"
                self.selected = {"epoch": int(row["epoch"]), "score": score, "weights": weights}
                if self.on_selected is not None:
                    self.on_selected(weights)

    def _handle_non_finite(self, what: str) -> None:
        if self.on_non_finite is not None:
            self.on_non_finite(what, torch.cat(self._images).tolist())
        if self.recipe.trainer.non_finite == "stop":
            raise ValueError(
                f"{what} in epoch {self.current_epoch}, step {self.global_step}; the images of the step are listed in "
                "non_finite.jsonl of the run folder. Lower optimizer.lr, set optimizer.clip_grad=1, use "
                "trainer.precision=bf16 or fp32, or leave such steps out with trainer.non_finite=skip"
            )

    def _note_skipped(self, name: str, batch: Batch) -> None:
        if batch.get("skipped"):
            self.trainer.datamodule.note_skipped(name, batch)  # type: ignore[attr-defined]

    def _meter(self, name: str) -> SplitMeter:
        meter = self.meters[f"{name}_meter"]
        assert isinstance(meter, SplitMeter)
        return meter
