"""Fit a fine-tune to a recipe: the classifier, the batches, and Lightning's Trainer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file, save_file

from eva_clip.transforms import build_eval_transform
from finetune.build import build_recipe_classifier
from finetune.contrastive import refresh_head
from finetune.data import FinetuneData
from finetune.module import FinetuneModule
from finetune.plan import epoch_steps
from finetune.sections import FinetuneRecipe
from finetune.sharding import build_strategy, gather, load_whole
from finetune.views import FinetuneTransform
from probes.checkpoints import KeepCheckpoints
from probes.class_weights import balanced_weights, positive_weights
from probes.schedule import warmup_cosine
from probes.sections import RecipeError
from probes.trainer import build_trainer, find_checkpoint, run_training

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from probes.runs import RunFolder
    from probes.splits import Splits

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Fitted:
    """A finished fine-tune."""

    module: FinetuneModule
    data: FinetuneData
    notes: list[str]


def fit_classifier(
    recipe: FinetuneRecipe,
    splits: Splits,
    run: RunFolder,
    *,
    on_row: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Train the classifier of a recipe whose `micro_batch` is set.

    Raises:
        RecipeError: the recipe does not fit the data or the machine.
        ValueError: weights that do not fit, an adapter that does not act, or a loss that is not finite.
    """
    pl.seed_everything(recipe.run.seed, verbose=False)
    model, notes = build_recipe_classifier(recipe, splits)
    data = build_data(recipe, splits, model)
    steps = data.samples_per_epoch // recipe.trainer.global_batch
    schedule = recipe.schedule
    peak = recipe.optimizer.lr
    rates = warmup_cosine(peak, schedule.final_lr, schedule.epochs, steps, schedule.warmup_epochs)
    module = FinetuneModule(
        model,
        recipe,
        rates / peak if peak else np.zeros_like(rates),
        data.evaluation_names,
        class_weights=_class_weights(recipe, splits),
        multi_label=splits.train.multi_hot is not None,
        on_row=on_row,
        on_selected=lambda weights: save_selected(run, module, weights),
        on_non_finite=lambda what, images: _note_non_finite(run, splits, what, images),
    )
    trainer = build_recipe_trainer(recipe, run)
    checkpoint, passed = find_checkpoint(run)
    notes += passed
    for note in notes:
        print(f"note: {note}", flush=True)
    run_training(trainer, module, checkpoint, datamodule=data)
    return Fitted(module, data, notes)


def build_data(recipe: FinetuneRecipe, splits: Splits, model: Classifier) -> FinetuneData:
    """The images of a recipe under its training view and the published evaluation view."""
    spec, trainer = model.spec, recipe.trainer
    size, mean, std = spec.vision.image_size, spec.image_mean, spec.image_std
    assert trainer.micro_batch is not None
    data = FinetuneData(
        splits,
        FinetuneTransform(size, mean, std, recipe.augment),
        build_eval_transform(size, mean, std),
        data=recipe.data,
        micro_batch=trainer.micro_batch,
        samples_per_epoch=epoch_steps(recipe, len(splits.train)) * trainer.global_batch,
        seed=recipe.run.seed,
    )
    data.repeats = recipe.augment.repeats
    return data


def build_recipe_trainer(recipe: FinetuneRecipe, run: RunFolder) -> pl.Trainer:
    """Lightning's Trainer of a recipe; loggers and checkpoints point into the run folder."""
    section = recipe.trainer
    assert section.micro_batch is not None
    processes = section.devices * section.nodes
    return build_trainer(
        run.path,
        [
            KeepCheckpoints(run.path / "checkpoints", recipe.checkpoint.every_steps, recipe.checkpoint.keep),
            SameBatch(section.micro_batch),
        ],
        max_epochs=recipe.schedule.epochs,
        devices=section.devices,
        num_nodes=section.nodes,
        strategy=build_strategy(section),
        precision=PRECISIONS[section.precision],
        accumulate_grad_batches=section.global_batch // (section.micro_batch * processes),
        log_every_n_steps=50,
    )


class SameBatch(Callback):
    """Ends a run whose processes have planned different micro-batches, as they may where other memory is free."""

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare. All processes fail together, so that none waits for another.

        Raises:
            RecipeError: they differ.
        """
        own = torch.tensor([self.micro_batch], device=trainer.strategy.root_device)
        found = sorted({int(size) for size in trainer.strategy.all_gather(own).flatten()})
        if len(found) > 1:
            raise RecipeError(
                f"the processes planned micro-batches of {found}: other memory is free on their devices; "
                f"set trainer.micro_batch={found[0]}"
            )


def save_selected(run: RunFolder, module: FinetuneModule, weights: str) -> None:
    """Keep the weights that the selection split prefers so far, whole or not at all."""
    state = weights_of(module, weights)
    if module.trainer.is_global_zero:
        folder = run.path / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "selected.safetensors.part"
        save_file(state, part)
        part.replace(folder / "selected.safetensors")


def load_selected(run: RunFolder, module: FinetuneModule) -> None:
    """Put the selected weights into the module's model."""
    load_whole(module.model, load_file(run.path / "checkpoints" / "selected.safetensors"))


def weights_of(module: FinetuneModule, weights: str) -> dict[str, torch.Tensor]:
    """Copy of the model's tensors on the CPU: "raw" or "ema"."""
    averaged = module.ema.average if weights == "ema" and module.ema is not None else {}
    with module.ema.applied(module.model) if averaged and module.ema else contextlib.nullcontext():
        refresh_head(module.model)
    state = {name: averaged.get(name, tensor) for name, tensor in module.model.state_dict().items()}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in gather(state).items()}


def _class_weights(recipe: FinetuneRecipe, splits: Splits) -> torch.Tensor | None:
    if recipe.regularisation.class_weights == "none":
        return None
    shown = splits.train.multi_hot
    if shown is not None:
        return positive_weights(torch.from_numpy(shown.sum(axis=0)), len(shown))
    return balanced_weights(torch.bincount(torch.from_numpy(splits.train.targets), minlength=len(splits.classes)))


def _note_non_finite(run: RunFolder, splits: Splits, what: str, images: list[int]) -> None:
    """Add a line to `non_finite.jsonl`: what happened, and the images of the step."""
    keys = splits.train.keys
    with (run.path / "non_finite.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"what": what, "images": [keys[position] for position in images]}) + "\n")
