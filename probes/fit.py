"""Fit a head to a recipe: the encoder, the batches, and Lightning's Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, Sampler

from eva_clip.transforms import LinearProbeTransform, build_eval_transform
from probes.batch_norm import SharedRunningStatistics
from probes.checkpoints import KeepCheckpoints
from probes.data import ImageDataModule
from probes.encoder import build_recipe_encoder, recipe_spec
from probes.extraction import load_tables
from probes.head_start import recipe_class_weights, start_head
from probes.module import LinearProbe
from probes.plan import steps_per_epoch
from probes.processes import share
from probes.sampling import EpochSampler
from probes.schedule import warmup_cosine
from probes.sections import Recipe, RecipeError
from probes.store_table import EncoderFacts, FeatureTable
from probes.trainer import build_trainer, find_checkpoint, predict_split, run_training

if TYPE_CHECKING:
    from eva_clip.encoder import VisionEncoder
    from eva_clip.spec_types import ModelSpec
    from probes.runs import RunFolder
    from probes.splits import Splits


class FeatureBatches(Sampler[tuple[int, list[int]]]):
    """Batches `(epoch, row numbers)` in the order of an `EpochSampler`; Lightning sets the epoch.

    Whole batches are dealt to the processes, so that the groups that BatchNorm sees do not depend on their number.
    """

    def __init__(self, sampler: EpochSampler, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self.sampler, self.batch, self.rank, self.world_size = sampler, batch, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch // self.world_size

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, rows = self.sampler.epoch, [row for _, row in self.sampler]
        for start in range(self.rank * self.batch, len(rows), self.world_size * self.batch):
            yield epoch, rows[start : start + self.batch]


class FeatureRows(Dataset[dict[str, torch.Tensor]]):
    """Stored features with their targets, or rows of the split's `multi_hot`.

    Item `(epoch, rows)` is a whole batch, of that epoch's view.
    """

    def __init__(self, table: FeatureTable, multi_hot: torch.Tensor | None = None) -> None:
        self.table = table
        self.targets = table.targets if multi_hot is None else multi_hot[table.index]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, list[int]]) -> dict[str, torch.Tensor]:
        epoch, rows = item
        return {
            "features": self.table.view(epoch % self.table.num_views)[rows].float(),
            "target": self.targets[rows],
            "index": self.table.index[rows],
        }


@dataclass(frozen=True)
class Fitted:
    """A trained probe and what is needed to score it."""

    module: LinearProbe
    encoder: EncoderFacts
    data: ImageDataModule
    tables: Mapping[str, FeatureTable] | None = None
    """Stored features by split name; None where the encoder ran at every step."""

    def predict(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C] of the head as it is on a split, and the samples' positions; see `predict_logits`."""
        if self.tables is None:
            batches: Any = self.data.loader(name)
        else:
            table = self.tables[name]
            batches = DataLoader(FeatureRows(table), sampler=share(_in_order(len(table))), batch_size=None)
        return predict_split(self.module.trainer, self.module, batches)


def fit_probe(
    recipe: Recipe,
    splits: Splits,
    *,
    run: RunFolder | None = None,
    weights: str = "",
    tables: Mapping[str, FeatureTable] | None = None,
    on_row: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Train the head of a recipe.

    Args:
        recipe: the recipe.
        splits: its data.
        run: where logs and checkpoints go; None keeps nothing (baselines).
        weights: replaces the recipe's encoder weights.
        tables: features of the splits, where they are at hand.
        on_row: called with every epoch's row.

    Raises:
        RecipeError: the recipe does not fit the data or the machine.
    """
    check_machine(recipe)
    pl.seed_everything(recipe.run.seed, verbose=False)
    encoder: VisionEncoder | None = None
    trainer = _build_recipe_trainer(recipe, run)
    if recipe.features.mode == "cached":
        tables = tables or load_tables(recipe, splits, weights=weights, views=recipe.features.views)
        facts, data = tables["train"].encoder, build_data(recipe, splits, recipe_spec(recipe))
        train, evaluation = _cached_loaders(recipe, splits, tables, trainer)
        for name, table in tables.items():
            data.skipped[name].update(table.skipped)
    else:
        encoder, report = build_recipe_encoder(recipe, weights)
        facts, data = EncoderFacts.of(encoder, report), build_data(recipe, splits, encoder.spec)
        train, evaluation = None, {}
    trainer_section, schedule = recipe.trainer, recipe.schedule
    if train is None:
        steps = data.samples_per_epoch // trainer_section.global_batch
    else:  # fewer than the recipe plans when unreadable images were left out
        steps = len(train) // trainer_section.accumulate
    torch.manual_seed(recipe.run.seed)
    module = LinearProbe(
        start_head(recipe, splits.classes, facts.feature_dim, weights),
        optimizer=recipe.optimizer,
        schedule=warmup_cosine(recipe.optimizer.lr, schedule.final_lr, schedule.epochs, steps, schedule.warmup_epochs),
        num_classes=len(splits.classes),
        evaluation_names=data.evaluation_names,
        multi_label=splits.train.multi_hot is not None,
        class_weights=recipe_class_weights(recipe, splits),
        encoder=encoder,
        encoder_sha256=facts.sha256,
        on_row=on_row,
    )
    checkpoint, passed = find_checkpoint(run)
    for note in passed:
        print(f"note: {note}", flush=True)
    loaders = {"train_dataloaders": train, "val_dataloaders": list(evaluation.values())}
    run_training(trainer, module, checkpoint, **({"datamodule": data} if train is None else loaders))
    return Fitted(module, facts, data, tables)


def build_data(recipe: Recipe, splits: Splits, spec: ModelSpec) -> ImageDataModule:
    """The images of a recipe under the published training and evaluation views."""
    trainer = recipe.trainer
    size, mean, std = spec.vision.image_size, spec.image_mean, spec.image_std
    steps = steps_per_epoch(len(splits.train), trainer.global_batch)
    return ImageDataModule(
        splits,
        LinearProbeTransform(size, mean, std),
        build_eval_transform(size, mean, std),
        data=recipe.data,
        micro_batch=trainer.micro_batch,
        samples_per_epoch=steps * trainer.global_batch,
        seed=recipe.run.seed,
    )


def _cached_loaders(
    recipe: Recipe, splits: Splits, tables: Mapping[str, FeatureTable], trainer: pl.Trainer
) -> tuple[Any, dict[str, Any]]:
    """Batches of stored features: of train this process's share in the order of training, of the other splits all.

    Every process scores all of them: the head is cheap on features, and means do not change when each sample counts
    as often.
    """
    shown = {name: split.multi_hot for name, split in splits.named.items() if split.multi_hot is not None}
    rows = {
        name: FeatureRows(table, torch.from_numpy(shown[name]) if name in shown else None)
        for name, table in tables.items()
    }
    train, section = rows.pop("train"), recipe.trainer
    used = steps_per_epoch(len(train), section.global_batch) * section.global_batch
    sampler = EpochSampler(len(train), used, recipe.run.seed)
    order = FeatureBatches(sampler, section.micro_batch, trainer.global_rank, trainer.world_size)
    return DataLoader(train, sampler=order, batch_size=None), {
        name: DataLoader(split, sampler=_in_order(len(split)), batch_size=None) for name, split in rows.items()
    }


def _in_order(count: int, batch: int = 4096) -> list[tuple[int, list[int]]]:
    return [(0, list(range(start, min(start + batch, count)))) for start in range(0, count, batch)]


def _build_recipe_trainer(recipe: Recipe, run: RunFolder | None) -> pl.Trainer:
    # These concern what this code sets on purpose.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the encoder stays so
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 against newer torch
    section = recipe.trainer
    callbacks: list[Callback] = [KeepCheckpoints(run.path / "checkpoints")] if run else []
    if section.devices > 1:
        callbacks.append(SharedRunningStatistics())
    return build_trainer(
        run.path if run else None,
        callbacks,
        max_epochs=recipe.schedule.epochs,
        devices=section.devices,
        strategy=section.strategy,
        sync_batchnorm=section.sync_batch_norm,
        precision="16-mixed" if section.precision == "fp16" else "32-true",
        accumulate_grad_batches=section.accumulate,
    )


def check_machine(recipe: Recipe) -> None:
    """Find what a recipe asks of the machine in vain.

    Raises:
        RecipeError: synchronised BatchNorm without a GPU; more devices than there are GPUs.
    """
    found = torch.cuda.device_count()
    if 0 < found < recipe.trainer.devices:
        raise RecipeError(f"trainer.devices is {recipe.trainer.devices} and this machine has {found} GPU(s)")
    if recipe.trainer.sync_batch_norm and not torch.cuda.is_available():
        raise RecipeError(
            "trainer.sync_batch_norm is true and there is no GPU, on which alone torch has it; set it false"
        )
