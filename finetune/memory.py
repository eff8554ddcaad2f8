"""Memory of one device in a fine-tune: what a recipe needs, what there is, and the micro-batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from probes.sections import RecipeError

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.activations import Activations
    from finetune.sections import FinetuneRecipe

GIB = 2**30
OVERHEAD_GIB = 1.0
"""What is no tensor: the kernels' workspaces, the buffers of messages between devices, fragmentation. The GPU's context
is not in it: its memory is not free."""
MOMENTS = {"adamw": 8, "adamw_8bit": 2, "sgd": 4}
"""Bytes of an optimizer's state for one parameter."""
ROOMY = 8
"""Images from which on a micro-batch fills a GPU's units, so that recomputation for more would only cost time."""


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters."""

    total: int
    trainable: int
    """Those that take gradients."""
    block: int
    """Of the largest block of the tower."""
    outside: int
    """Of all but the blocks."""


@dataclass(frozen=True)
class Memory:
    """Predicted peak memory of one device in GiB."""

    weights: float
    """fp32."""
    average: float
    """fp32, of what is trained."""
    gradients: float
    """fp32, whole: micro-batches add to them while the next one runs."""
    moments: float
    """The optimizer's state."""
    gathered: float
    """Sharded training: blocks that are whole for the moment, and their gradients."""
    copies: float
    """Of weights in half precision, which autograd keeps from the forward to the backward pass."""
    activations: float
    """Of one micro-batch, with what its backward pass needs besides."""

    @property
    def tensors(self) -> float:
        """Sum of all parts."""
        return float(sum(asdict(self).values()))

    @property
    def total(self) -> float:
        """Sum, with what is no tensor."""
        return self.tensors + OVERHEAD_GIB


@dataclass(frozen=True)
class Room:
    """Memory of a GPU in GiB."""

    free: float
    total: float


def measure_room() -> Room | None:
    """Memory of this process's GPU as it is now; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    local = next((int(os.environ[name]) for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), 0)
    free, total = torch.cuda.mem_get_info(local % torch.cuda.device_count())
    return Room(free / GIB, total / GIB)


def count_parameters(model: Classifier) -> Parameters:
    """Parameters of a classifier, of tensors of any kind."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.tower.blocks]
    total = sum(size for size, _ in sizes)
    return Parameters(total, sum(size for size, trained in sizes if trained), max(blocks), total - sum(blocks))


def predict_memory(recipe: FinetuneRecipe, parameters: Parameters, activations: Activations) -> Memory:
    """Memory of a training step on each of the recipe's devices.

    "fsdp2" holds a part of weights, average, gradients and moments. Gathered are the block at work and the next one,
    with the buffer that it arrives in; in the backward pass the block's gradients, and those of this and of the last
    block in fp32, on their way to the other devices; all the time in which it passes back, what is outside the blocks.
    In bf16 blocks are gathered in bf16, so that autograd keeps no copies. "ddp" holds everything on every device, and
    gradients once: they lie in the buckets that are sent (`finetune.sharding.build_strategy`).
    """
    section, gathered, copies = recipe.trainer, 0, activations.copies
    parts = section.devices * section.nodes if section.strategy == "fsdp2" else 1
    if section.strategy == "fsdp2":
        half = section.precision == "bf16"
        gathered = parameters.block * ((2 if half else 4) * (3 + 1) + 4 * 2) + parameters.outside * 4 * 2
        copies = 0 if half else copies
    trained = parameters.trainable / parts / GIB
    return Memory(
        weights=4 * parameters.total / parts / GIB,
        average=0.0 if recipe.ema.decay is None else 4 * trained,
        gradients=4 * trained,
        moments=MOMENTS[recipe.optimizer.name] * trained,
        gathered=gathered / GIB,
        copies=copies / GIB,
        activations=(activations.kept + activations.passing) / GIB,
    )


def choose_micro_batch(
    recipe: FinetuneRecipe, predict: Callable[[int, bool], Memory], room: Room | None
) -> tuple[int, bool]:
    """Largest micro-batch that fits the device, and whether activations must be recomputed for it.

    Without a GPU nothing limits but time: up to 32 images and no recomputation. What the recipe fixes stays as it is.

    Args:
        recipe: whose `trainer` may fix the micro-batch, recomputation, or both.
        predict: memory of a micro-batch without (False) or with recomputation; it grows with the micro-batch.
        room: the device's; None without a GPU.

    Raises:
        RecipeError: not even the smallest step fits; what would is named.
    """
    section = recipe.trainer
    per_device = section.global_batch // (section.devices * section.nodes)
    sizes = [section.micro_batch] if section.micro_batch else divisors(per_device)
    ways = [section.checkpointing] if section.checkpointing is not None else [False, True]
    if room is None:
        return max(size for size in sizes if size <= max(32, sizes[0])), ways[0]
    for checkpointing in ways:
        size = _largest(sizes, lambda size, way=checkpointing: predict(size, way).total <= room.free)  # type: ignore[misc]
        if size is not None and (size >= ROOMY or checkpointing == ways[-1] or size == sizes[-1]):
            return size, checkpointing
    needed = predict(sizes[0], ways[-1]).total
    raise RecipeError(
        f"the smallest step needs about {needed:.1f} GiB, and the device has {room.free:.1f} free of "
        f"{room.total:.1f}; try tune.what=lora or last_blocks, ema.decay=null, trainer.checkpointing=true, several "
        "devices with trainer.strategy=fsdp2, a smaller model, or end what else uses the device"
    )


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, where all below one that fits do; few are tried."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
