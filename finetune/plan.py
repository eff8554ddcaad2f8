"""What a fine-tuning recipe would do, without reading an image: steps, learning rates, groups, parameters, memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.compute_cost import EFFICIENCY, forward_equivalents, measure_tflops, predict_hours
from finetune.memory import Memory, Parameters, Room, choose_micro_batch, predict_memory
from finetune.sections import FinetuneRecipe
from probes.plan import describe_pos_embed, measure_data, steps_per_epoch
from probes.precision import settle_precision
from probes.schedule import epoch_means, warmup_cosine
from probes.sections import RecipeError

if TYPE_CHECKING:
    from eva_clip.spec_types import ModelSpec


def check_recipe(recipe: FinetuneRecipe, train_size: int | None = None) -> None:
    """Find mistakes that need the model's shape or the data's size, before a run folder is made. Imports no torch.

    Raises:
        RecipeError: a batch that the devices do not divide, or more than there are images; missing weights.
        ValueError: unknown model, or a resolution that its patches do not divide.
    """
    from eva_clip.specs import add_model_config, get_model_spec

    if recipe.model.config:
        add_model_config(recipe.model.config)
    spec = get_model_spec(recipe.model.name)
    if recipe.model.image_size:
        spec.at_image_size(recipe.model.image_size)
    weights, section = recipe.model.weights, recipe.trainer
    if weights not in ("pretrained", "random") and not Path(weights).is_file():
        raise RecipeError(f"model.weights: no file at {weights}; expected pretrained, random, or a checkpoint file")
    unit = section.devices * section.nodes * (section.micro_batch or 1)
    if section.global_batch % unit:
        raise RecipeError(
            f"trainer.global_batch {section.global_batch} is not a multiple of micro_batch x devices x nodes, {unit}; "
            "change one of them"
        )
    if recipe.head.objective == "contrastive":
        check_contrastive(recipe)
    if recipe.optimizer.name == "adamw_8bit" and section.strategy == "fsdp2":
        raise RecipeError(
            "optimizer.name is 'adamw_8bit' with trainer.strategy 'fsdp2', which spreads the moments over devices "
            "already; use one of the two"
        )
    if train_size is not None:
        epoch_steps(recipe, train_size)


def epoch_steps(recipe: FinetuneRecipe, train_size: int) -> int:
    """Optimizer steps of one epoch, planned and run: repeated views take the place of other images.

    Raises:
        RecipeError: fewer images than one batch.
    """
    return steps_per_epoch(train_size, recipe.trainer.global_batch)


def check_contrastive(recipe: FinetuneRecipe) -> None:
    """Refuse what a contrastive objective has no place for.

    Raises:
        RecipeError: the settings at fault, by name.
    """
    wrong = {
        "regularisation.label_smoothing": (recipe.regularisation.label_smoothing, 0.0),
        "regularisation.class_weights": (recipe.regularisation.class_weights, "none"),
        "augment.mixup": (recipe.augment.mixup, 0.0),
        "augment.cutmix": (recipe.augment.cutmix, 0.0),
        "tune.what": (recipe.tune.what, "all"),
        "trainer.strategy": ("fsdp2", "ddp") if recipe.trainer.strategy == "fsdp2" else (None, None),
    }
    problems = [
        f"{name} is {found!r}; expected {expected!r}" for name, (found, expected) in wrong.items() if found != expected
    ]
    if recipe.data.labels == "multi":
        problems.append("data.labels is 'multi'; a contrastive objective takes one class an image")
    if problems:
        raise RecipeError("\n".join(["head.objective is 'contrastive'", *problems]))


def plan_finetune(recipe: FinetuneRecipe, room: Room | None = None) -> dict[str, Any]:
    """The content of `python -m finetune RECIPE --plan`: the probe's fields, groups, memory (GiB) and hours.

    `lr_by_epoch` is of the last layers' groups, `min_lr_by_epoch` of the lowest bucket, means over steps. `hours` is
    for as many devices like this one as the recipe names; `hours_from` says what it was computed from, with the images
    that are scored after every epoch (null where the data are not there; their time is then left out). Memory is that
    of a GPU, also where there is none (`room` None).
    """
    check_recipe(recipe)
    from finetune.activations import build_meta

    recipe, precision = settle_precision(recipe, planned=True)
    from finetune.layer_decay import build_param_groups, describe_groups

    size = measure_data(recipe.data)
    steps = epoch_steps(recipe, size.train)
    model = build_meta(recipe, size.classes)
    section = recipe.optimizer
    groups = build_param_groups(model, section.lr, section.weight_decay, section.layer_decay)
    micro_batch, checkpointing, memory, parameters = _settle(recipe, size.classes, room)
    speed = measure_tflops(recipe.trainer.precision)
    schedule = recipe.schedule
    rates = warmup_cosine(section.lr, schedule.final_lr, schedule.epochs, steps, schedule.warmup_epochs)
    lowest = min(group["lr"] for group in groups) / section.lr if section.lr else 0.0
    processes = recipe.trainer.devices * recipe.trainer.nodes
    return {
        "global_batch": recipe.trainer.global_batch,
        "micro_batch": micro_batch,
        "accumulate": recipe.trainer.global_batch // (micro_batch * processes),
        "checkpointing": checkpointing,
        "devices": processes,
        "steps_per_epoch": steps,
        "epochs": schedule.epochs,
        "lr_by_epoch": epoch_means(rates, schedule.epochs),
        "min_lr_by_epoch": epoch_means(rates * lowest, schedule.epochs),
        "trainable_parameters": parameters.trainable,
        "total_parameters": parameters.total,
        "precision": precision,
        "image_size": model.spec.vision.image_size,
        "pos_embed": describe_pos_embed(recipe.model),
        "train_size": size.train,
        "num_classes": size.classes,
        "peak_memory_gib": round(memory.total, 2),
        "memory_gib": {name: round(part, 3) for name, part in asdict(memory).items()},
        "hours": round(hours_of(recipe, model.spec, steps, size.evaluated or 0, checkpointing, speed), 4),
        "hours_from": {
            "matrix_product_tflops": round(speed, 3),
            "assumed_share": EFFICIENCY,
            "evaluated_per_epoch": size.evaluated,
        },
        "param_groups": describe_groups(groups),
    }


def hours_of(
    recipe: FinetuneRecipe, spec: ModelSpec, steps: int, evaluated: int, checkpointing: bool, tflops: float
) -> float:
    """Hours of a recipe on devices of that speed: its training, and `evaluated` images after every epoch.

    These pass once, and once more where averaged weights are scored beside the raw ones.
    """
    section = recipe.trainer
    dropped = recipe.regularisation.drop_path / 2 if recipe.regularisation.skip_dropped else 0.0  # mean over blocks
    passes = forward_equivalents(recipe.tune, spec.vision.layers, checkpointing=checkpointing, dropped=dropped)
    epochs, speed = recipe.schedule.epochs, tflops * section.devices * section.nodes
    training = predict_hours(spec, section.global_batch * steps * epochs, passes, speed)
    return training + predict_hours(spec, evaluated * epochs, 1.0 if recipe.ema.decay is None else 2.0, speed)


def settle_batch(recipe: FinetuneRecipe, num_classes: int, room: Room | None) -> tuple[FinetuneRecipe, Memory]:
    """The recipe with micro-batch and checkpointing as the planner chooses them for a device, and its memory.

    The model is built without its weights: what cannot be trained as the recipe says is found here.

    Args:
        recipe: with its precision settled.
        num_classes: of the data.
        room: the device's memory; None without a GPU.

    Raises:
        RecipeError: nothing fits.
        ValueError: blocks or layers to train that the model does not have; a missing extra.
    """
    size, checkpointing, memory, _ = _settle(recipe, num_classes, room)
    trainer = replace(recipe.trainer, micro_batch=size, checkpointing=checkpointing)
    return replace(recipe, trainer=trainer), memory


def _settle(recipe: FinetuneRecipe, num_classes: int, room: Room | None) -> tuple[int, bool, Memory, Parameters]:
    """Micro-batch, recomputation and memory of a recipe, and its parameters."""
    from finetune.activations import StepCounter

    counter = StepCounter(recipe, num_classes)

    @cache
    def predict(micro_batch: int, checkpointing: bool) -> Memory:
        return predict_memory(recipe, counter.parameters, counter.count(micro_batch, checkpointing=checkpointing))

    size, checkpointing = choose_micro_batch(recipe, predict, room)
    return size, checkpointing, predict(size, checkpointing), counter.parameters
