"""What a recipe would do, without reading an image: steps, learning rates, parameter counts, shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.schedule import epoch_means, warmup_cosine
from probes.sections import DataSection, ModelSection, Recipe, RecipeError


@dataclass(frozen=True)
class DataSize:
    """Number of samples that are trained on, and of classes."""

    train: int
    classes: int
    evaluated: int | None = None
    """Samples that are scored after every epoch; None where the data are not there to be counted."""


def measure_data(data: DataSection) -> DataSize:
    """Sizes from the data where they are present, else from `data.train_size` and `data.num_classes`.

    Raises:
        RecipeError: neither the data nor the figures are there.
    """
    paths = [path.strip() for path in (data.train or "").split(",") if path.strip()]
    absent = not paths or not all(Path(path).exists() or "{" in path for path in paths)
    if absent and data.train_size is not None and data.num_classes is not None:
        held_out = 0 if data.val else round(data.holdout * data.train_size)
        return DataSize(data.train_size - held_out, data.num_classes)
    from probes.splits import prepare_splits

    splits = prepare_splits(data, multi_label=data.labels == "multi")  # the run itself refuses where it must
    evaluated = sum(len(split) for name, split in splits.named.items() if name != "train")
    return DataSize(len(splits.train), len(splits.classes), evaluated)


def check_model(model: ModelSection) -> None:
    """Find mistakes that need the model's shape, before a run folder is made. Imports no torch.

    Raises:
        RecipeError: no such weight file.
        ValueError: unknown model, or a resolution that its patches do not divide.
    """
    from eva_clip.specs import add_model_config, get_model_spec

    if model.config:
        add_model_config(model.config)
    spec = get_model_spec(model.name)
    if model.image_size:
        spec.at_image_size(model.image_size)
    if model.weights not in ("pretrained", "random") and not Path(model.weights).is_file():
        raise RecipeError(
            f"model.weights: no file at {model.weights}; expected pretrained, random, or a checkpoint file"
        )


def check_recipe(recipe: Recipe, train_size: int | None = None) -> None:
    """`check_model`, and what needs the data's size.

    Raises:
        RecipeError: fewer images than one batch, or no such weight file.
        ValueError: unknown model, or a resolution that its patches do not divide.
    """
    check_model(recipe.model)
    if train_size is not None:
        steps_per_epoch(train_size, recipe.trainer.global_batch)


def steps_per_epoch(train_size: int, global_batch: int) -> int:
    """Optimizer steps of one epoch; the last partial batch is dropped, as in the published runs.

    Raises:
        RecipeError: fewer images than one batch.
    """
    if train_size < global_batch:
        raise RecipeError(
            f"trainer.global_batch {global_batch} is larger than the {train_size} training images; set "
            f"trainer.global_batch to at most {train_size} (and trainer.micro_batch to a divisor of it)"
        )
    return train_size // global_batch


def plan_linear(recipe: Recipe) -> dict[str, Any]:
    """The content of `python -m probes.linear RECIPE --plan`.

    `lr_by_epoch` and `min_lr_by_epoch` are means over the steps of each epoch (of the highest and the lowest group;
    a probe has one rate); `total_parameters` counts the tower that runs and the head.
    """
    import torch

    check_recipe(recipe)
    from probes.encoder import build_recipe_encoder
    from probes.heads import build_head
    from probes.precision import settle_precision

    recipe, precision = settle_precision(recipe, planned=True)

    size = measure_data(recipe.data)
    trainer, schedule = recipe.trainer, recipe.schedule
    steps = steps_per_epoch(size.train, trainer.global_batch)
    with torch.device("meta"):
        encoder, _ = build_recipe_encoder(recipe, weights="random")
        head = build_head(recipe.head.kind, encoder.feature_dim, size.classes)
    rates = epoch_means(
        warmup_cosine(recipe.optimizer.lr, schedule.final_lr, schedule.epochs, steps, schedule.warmup_epochs),
        schedule.epochs,
    )
    trainable = sum(parameter.numel() for parameter in head.parameters())
    return {
        "global_batch": trainer.global_batch,
        "micro_batch": trainer.micro_batch,
        "accumulate": trainer.accumulate,
        "devices": trainer.devices,
        "steps_per_epoch": steps,
        "epochs": schedule.epochs,
        "lr_by_epoch": rates,
        "min_lr_by_epoch": rates,
        "trainable_parameters": trainable,
        "total_parameters": trainable + sum(p.numel() for p in encoder.parameters()),
        "feature_dim": encoder.feature_dim,
        "precision": precision,
        "image_size": encoder.spec.vision.image_size,
        "pos_embed": describe_pos_embed(recipe.model),
        "train_size": size.train,
        "num_classes": size.classes,
    }


def describe_pos_embed(model: ModelSection) -> dict[str, Any]:
    """Side of the position grid in the model's own configuration and at the recipe's resolution, in patches."""
    from eva_clip.specs import get_model_spec

    spec = get_model_spec(model.name)
    target = spec.at_image_size(model.image_size or spec.vision.image_size)
    return {"from": spec.vision.grid_size, "to": target.vision.grid_size, "mode": model.pos_embed}
