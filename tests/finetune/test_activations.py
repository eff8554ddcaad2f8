"""Counted activations against whole towers, a block by hand, and the allocator of real steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from eva_clip.models import DTYPES
from eva_clip.specs import get_model_spec
from finetune.activations import StepCounter, build_meta
from finetune.contrastive import contrastive_loss
from finetune.fake_step import GpuKernels, gpu_autocast
from finetune.sections import FinetuneRecipe
from finetune.targets import classification_loss
from probes.recipe import load_recipe

REPO = Path(__file__).resolve().parents[2]
WHAT = ["all", "last_blocks", "norm", "bias", "lora"]
FAMILIES = ["eva01", "eva02", "eva02_post_norm", "clip"]
PLAIN = "regularisation.skip_dropped=false"
CONTRASTIVE = [
    "head.pool=cls",
    "head.start=zero_shot",
    "head.objective=contrastive",
    "regularisation.label_smoothing=0",
]


def recipe(name: str, *overrides: str) -> FinetuneRecipe:
    return load_recipe(REPO / "recipes" / f"{name}.yaml", overrides, FinetuneRecipe)


def saved_bytes(recipe: FinetuneRecipe, classes: int, micro_batch: int, *, checkpointing: bool = False) -> int:
    """What autograd still holds after a forward pass of the whole tower, every block of it; storages count once."""
    model, found = build_meta(recipe, classes), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda:0").train()
        if checkpointing:
            model.tower.set_grad_checkpointing(True)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[StorageWeakRef(storage)] = storage.nbytes()
            return tensor

        size = model.spec.vision.image_size
        images = torch.empty(micro_batch, 3, size, size, device="cuda:0")
        target = torch.zeros(micro_batch, dtype=torch.int64, device="cuda:0")
        half = DTYPES[recipe.trainer.precision] if recipe.trainer.precision != "fp32" else None
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, gpu_autocast(half), GpuKernels(classes):
            if recipe.head.objective == "contrastive":
                loss, _ = contrastive_loss(model.forward_features(images), target, model.texts)
            else:
                loss = classification_loss(model(images), target, recipe.regularisation.label_smoothing)
        assert loss.requires_grad
        return sum(size for storage, size in found.items() if not storage.expired())


TOWERS = [
    ("imagenet1k/finetune_eva02_b16", what, precision, checkpointing)
    for what in WHAT
    for precision in ("fp32", "bf16", "fp16")
    for checkpointing in (False, True)
]
TOWERS += [
    ("imagenet1k/finetune_224", "all", "fp16", False),
    ("imagenet1k/finetune_224", "lora", "bf16", True),
    ("imagenet1k/finetune_336", "bias", "bf16", False),
    ("imagenet1k/finetune_eva02_l14_336", "all", "bf16", False),
    ("imagenet1k/finetune_eva02_l14_336", "last_blocks", "fp32", False),
]


@pytest.mark.parametrize(("name", "what", "precision", "checkpointing"), TOWERS)
def test_two_blocks_of_a_kind_tell_what_the_whole_tower_keeps(name, what, precision, checkpointing):
    if what == "lora":
        pytest.importorskip("peft")
    asked = recipe(name, f"tune.what={what}", f"trainer.precision={precision}", PLAIN)
    counted = StepCounter(asked, 1000).count(3, checkpointing=checkpointing)
    images = 3 * 3 * get_model_spec(asked.model.name).at_image_size(asked.model.image_size).vision.image_size ** 2 * 4
    saved = saved_bytes(asked, 1000, 3, checkpointing=checkpointing)
    print(name, what, precision, checkpointing, (counted.kept + counted.copies - images) / saved)
    assert counted.kept + counted.copies - images == pytest.approx(saved, rel=0.05)
