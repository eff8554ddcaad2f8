from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eva_clip import build_classifier
from finetune.layer_decay import build_param_groups
from finetune.module import FinetuneModule
from finetune.sections import FinetuneRecipe
from probes.recipe import load_recipe
from probes.schedule import warmup_cosine

REPO = Path(__file__).resolve().parents[2]
STEPS, BATCH, CLASSES = 5, 4, 3


@pytest.fixture
def recipe() -> FinetuneRecipe:
    overrides = [
        "regularisation.drop_path=0.0", "regularisation.label_smoothing=0.3", "optimizer.lr=1e-3",
        "optimizer.layer_decay=0.7", "ema.decay=0.9", "schedule.epochs=1", "schedule.warmup_epochs=0.4",
    ]  # fmt: skip
    return load_recipe(REPO / "recipes" / "quickstart" / "finetune.yaml", overrides, FinetuneRecipe)


def published_loop(model, recipe, batches):
    """The published update written out: layer-decayed AdamW, smoothed cross-entropy, average after each step."""
    rates = warmup_cosine(recipe.optimizer.lr, 0.0, 1, STEPS, 0.4)
    depth = len(model.tower.blocks)
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, batch in enumerate(batches):
        model.zero_grad()
        logits = model(batch["image"])
        smooth = F.one_hot(batch["target"], CLASSES) * 0.7 + 0.3 / CLASSES
        (-(smooth * logits.log_softmax(1)).sum(1)).mean().backward()
        for name, p in model.named_parameters():
            if name.startswith("tower.patch_embed"):
                continue
            parts = name.split(".")
            layer = (
                int(parts[2]) + 1 if "blocks" in parts else 0 if parts[1] in ("cls_token", "pos_embed") else depth + 1
            )
            rate = rates[step] * 0.7 ** (depth + 1 - layer)
            decay = 0.05 if p.ndim > 1 and parts[-1] not in ("cls_token", "pos_embed") else 0.0
            first, second = state[name]
            with torch.no_grad():
                first.mul_(0.9).add_(p.grad, alpha=0.1)
                second.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                p.mul_(1 - rate * decay)
                corrected = second.sqrt() / math.sqrt(1 - 0.999 ** (step + 1)) + 1e-8
                p.addcdiv_(first, corrected, value=-rate / (1 - 0.9 ** (step + 1)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].mul_(0.9).add_(p, alpha=0.1)
    return average


def test_five_steps_equal_a_loop_written_by_hand(recipe, tmp_path):
    torch.manual_seed(0)
    ours = build_classifier("EVA01-CLIP-nano", CLASSES, pool="gap", checkpoint="pretrained", drop_path_rate=0.0).train()
    ours.tower.patch_embed.requires_grad_(False)
    reference = copy.deepcopy(ours).requires_grad_(True)
    size = ours.spec.vision.image_size
    batches = [
        {"image": torch.randn(BATCH, 3, size, size), "target": torch.randint(CLASSES, (BATCH,)),
         "index": torch.arange(BATCH), "skipped": []}
        for _ in range(STEPS)
    ]  # fmt: skip
    factor = warmup_cosine(1.0, 0.0, 1, STEPS, 0.4)
    module = FinetuneModule(ours, recipe, factor, [])
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    average = published_loop(reference, recipe, batches)
    for (name, found), wanted in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        if found.requires_grad:
            torch.testing.assert_close(module.ema.average[name], average[name], atol=1e-6, rtol=1e-6)
    assert module.ema.updates == STEPS
    assert len(module.history) == 1
    assert len(build_param_groups(ours, 1.0, 0.05, 0.7)) == 2 * (len(ours.tower.blocks) + 2) - 1
