"""What a fine-tuning recipe would do, without reading an image: steps, learning rates, groups, parameters, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.compute_cost import EFFICIENCY, forward_equivalents, measure_tflops, predict_hours
from finetune.sections import FinetuneRecipe
from probes.plan import describe_pos_embed, measure_data, steps_per_epoch
from probes.precision import settle_precision
from probes.schedule import epoch_means, warmup_cosine
from probes.sections import RecipeError

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from eva_clip.spec_types import ModelSpec

ACTIVATIONS_PER_BLOCK = 34
"""Values of 2 bytes kept for the backward pass, per token and unit of width of a block with MLP ratio 4 (Korthikanti et
al. 2022, equation 1, bytes; the attention matrix is not kept by fused attention)."""
OVERHEAD_GIB = 1.0
"""Context, kernels' workspace and fragmentation on a GPU."""


@dataclass(frozen=True)
class Memory:
    """Predicted peak memory of one device in GiB."""

    weights: float
    """fp32 weights, and the average's."""
    training: float
    """Gradients, fp32, and the optimizer's state of what is trained."""
    activations: float
    """Of one micro-batch."""

    @property
    def total(self) -> float:
        """Sum, with the overhead."""
        return self.weights + self.training + self.activations + OVERHEAD_GIB


def predict_memory(
    spec: ModelSpec,
    total: int,
    trainable: int,
    micro_batch: int,
    *,
    checkpointing: bool,
    ema: bool,
    half: bool,
    moments: int = 8,
) -> Memory:
    """Memory of a step from counts of parameters and the tower's shape; sharding is not counted.

    Args:
        spec: the model at the recipe's resolution.
        total: parameters.
        trainable: parameters that take gradients.
        micro_batch: images of one forward pass on one device.
        checkpointing: blocks are recomputed in the backward pass.
        ema: an average of the trained weights is kept.
        half: activations take 2 bytes a value, not 4.
        moments: bytes of the optimizer's state for one parameter.
    """
    vision = spec.vision
    tokens = micro_batch * ((vision.image_size // vision.patch_size) ** 2 + 1)
    width = tokens * vision.width * (1 if half else 2)  # in units of 2 bytes
    block = ACTIVATIONS_PER_BLOCK * width * (0.5 + vision.mlp_ratio / 8)
    kept = 2 * width * vision.layers + block if checkpointing else block * vision.layers
    gib = 2**30
    return Memory((4 * total + (4 * trainable if ema else 0)) / gib, (4 + moments) * trainable / gib, kept / gib)


def choose_micro_batch(recipe: FinetuneRecipe, spec: ModelSpec, total: int, trainable: int) -> tuple[int, bool]:
    """Largest micro-batch that fits the device, and whether activations must be recomputed for it.

    Without a GPU nothing limits but time: up to 32 images and no recomputation. What the recipe fixes stays as it is.

    Raises:
        RecipeError: not even one image fits; what would is named.
    """
    import torch

    section = recipe.trainer
    per_device = section.global_batch // (section.devices * section.nodes)
    sizes = [section.micro_batch] if section.micro_batch else divisors(per_device)
    ways = [section.checkpointing] if section.checkpointing is not None else [False, True]
    if not torch.cuda.is_available():
        return max(size for size in sizes if size <= max(32, sizes[0])), bool(ways[0])
    room = torch.cuda.mem_get_info()[1] / 2**30
    for checkpointing in ways:
        for size in reversed(sizes):
            memory = _predict(recipe, spec, total, trainable, size, bool(checkpointing))
            if memory.total <= room and (size >= 8 or checkpointing == ways[-1] or size == sizes[-1]):
                return size, bool(checkpointing)
    needed = _predict(recipe, spec, total, trainable, sizes[0], bool(ways[-1])).total
    raise RecipeError(
        f"the smallest step needs about {needed:.0f} GiB and the device has {room:.0f}; try tune.what=lora or "
        "last_blocks, ema.decay=null, trainer.checkpointing=true or a smaller model"
    )


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


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
        steps_per_epoch(train_size * recipe.augment.repeats, section.global_batch)


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


def count_parameters(recipe: FinetuneRecipe, model: Classifier) -> tuple[int, int]:
    """All parameters and those that are trained; a contrastive objective adds the text side and fixes the head."""
    import torch

    from eva_clip.towers import build_text_tower

    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if recipe.head.objective == "contrastive":
        with torch.device("meta"):
            text = sum(parameter.numel() for parameter in build_text_tower(model.spec).parameters())
        text += model.spec.vision.width * model.spec.embed_dim + 1  # projection and scale
        head = sum(parameter.numel() for parameter in model.head.parameters())
        return total + text, trainable + text - head
    return total, trainable


def plan_finetune(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The content of `python -m finetune RECIPE --plan`: the probe's fields, groups, memory (GiB) and hours.

    `lr_by_epoch` is of the last layers' groups, `min_lr_by_epoch` of the lowest bucket, means over steps. `hours` is
    for as many devices like this one as the recipe names; `hours_from` says what it was computed from, with the images
    that are scored after every epoch (null where the data are not there; their time is then left out).
    """
    import torch

    check_recipe(recipe)
    recipe, precision = settle_precision(recipe, planned=True)
    from finetune.build import build_untrained
    from finetune.layer_decay import build_param_groups, describe_groups

    size = measure_data(recipe.data)
    steps = steps_per_epoch(size.train * recipe.augment.repeats, recipe.trainer.global_batch)
    with torch.device("meta"):
        model = build_untrained(recipe, size.classes, None)
    section = recipe.optimizer
    groups = build_param_groups(model, section.lr, section.weight_decay, section.layer_decay)
    total, trainable = count_parameters(recipe, model)
    micro_batch, checkpointing = choose_micro_batch(recipe, model.spec, total, trainable)
    memory = _predict(recipe, model.spec, total, trainable, micro_batch, checkpointing)
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
        "trainable_parameters": trainable,
        "total_parameters": total,
        "precision": precision,
        "image_size": model.spec.vision.image_size,
        "pos_embed": describe_pos_embed(recipe.model),
        "train_size": size.train,
        "num_classes": size.classes,
        "peak_memory_gib": round(memory.total, 2),
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


def settle_batch(recipe: FinetuneRecipe, num_classes: int) -> tuple[FinetuneRecipe, Memory]:
    """The recipe with micro-batch and checkpointing as the planner chooses them for this device, and its memory.

    The model is built without its weights: what cannot be trained as the recipe says is found here.

    Raises:
        RecipeError: nothing fits.
        ValueError: blocks or layers to train that the model does not have; a missing extra.
    """
    import torch

    from finetune.build import build_untrained

    with torch.device("meta"):
        model = build_untrained(recipe, num_classes, None)
    total, trainable = count_parameters(recipe, model)
    size, checkpointing = choose_micro_batch(recipe, model.spec, total, trainable)
    trainer = replace(recipe.trainer, micro_batch=size, checkpointing=checkpointing)
    return replace(recipe, trainer=trainer), _predict(recipe, model.spec, total, trainable, size, checkpointing)


def _predict(
    recipe: FinetuneRecipe, spec: ModelSpec, total: int, trainable: int, micro_batch: int, checkpointing: bool
) -> Memory:
    return predict_memory(
        spec,
        total,
        trainable,
        micro_batch,
        checkpointing=checkpointing,
        ema=recipe.ema.decay is not None,
        half=recipe.trainer.precision != "fp32",
        moments={"adamw": 8, "adamw_8bit": 2, "sgd": 4}[recipe.optimizer.name],
    )
