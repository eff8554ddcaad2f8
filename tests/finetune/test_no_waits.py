"""A training step waits for the device once, to read its figures. On the meta device every other wait raises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eva_clip import build_classifier
from eva_clip.encoder import build_encoder
from eva_clip.models import build_model
from finetune.contrastive import ClassTexts, attach_texts
from finetune.drop_path import skip_dropped_paths
from finetune.module import FinetuneModule
from finetune.sections import FinetuneRecipe
from probes.bank import HeadBank, build_grid
from probes.heads import build_head
from probes.module import LinearProbe
from probes.recipe import load_recipe
from probes.sections import OptimizerSection

REPO = Path(__file__).resolve().parents[2]
CLASSES, BATCH, PARTS = 7, 4, 2
NANO = "EVA01-CLIP-nano"


class NoCopies(TorchDispatchMode):
    """Raises where a tensor of the host is copied to the device and waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            assert args[0].device.type == out.device.type, f"a copy from {args[0].device} to {out.device}"
        return out


@pytest.fixture
def reads(monkeypatch):
    """The number of reads so far, as a list of one; what is read is zeros."""
    count = [0]

    def tolist(self):
        assert self.device.type == "meta"
        count[0] += 1
        return torch.zeros(self.shape).numpy().tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    autocast = torch.autocast  # which knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: autocast("cpu", **options))
    return count


def run_steps(module: pl.LightningModule, batch, reads) -> None:
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=PARTS)
    module.to("meta")
    if isinstance(module, FinetuneModule):
        module.on_fit_start()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        for part in range(PARTS):
            module.on_train_batch_start(batch, step * PARTS + part)
            with NoCopies():
                (module.training_step(batch, step * PARTS + part) / PARTS).backward()
            assert reads[0] == step, "a micro-batch waits"
        with NoCopies():
            module.on_before_optimizer_step(optimizer)
            if isinstance(module, FinetuneModule):
                module.ema.update(module.model)
        optimizer.zero_grad()
        assert reads[0] == step + 1


@pytest.mark.parametrize("kind", ["classes", "several labels", "contrastive", "contrastive with more classes"])
def test_a_fine_tune(kind, reads, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    classes = 40 if "more" in kind else CLASSES
    overrides = ["regularisation.label_smoothing=0.1", "optimizer.clip_grad=1.0"]
    recipe = load_recipe(REPO / "recipes" / "quickstart" / "finetune.yaml", overrides, FinetuneRecipe)
    model = build_classifier(NANO, classes, pool="cls", checkpoint=None, drop_path_rate=0.3).train()
    skip_dropped_paths(model.tower)
    if "contrastive" in kind:
        attach_texts(model, ClassTexts(build_model(NANO)[0], [str(number) for number in range(classes)], length=3.0))
    several, weights = kind == "several labels", torch.ones(classes)
    module = FinetuneModule(model, recipe, np.ones(2), [], class_weights=weights, multi_label=several)
    side = model.spec.vision.image_size
    target = torch.zeros(BATCH, classes, dtype=torch.bool) if several else torch.arange(BATCH)
    batch = {"image": torch.zeros(BATCH, 3, side, side), "target": target, "index": torch.arange(BATCH)}
    run_steps(module, {name: tensor.to("meta") for name, tensor in batch.items()} | {"skipped": []}, reads)


@pytest.mark.parametrize("several", [False, True])
def test_a_probe(several, reads, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder(NANO, "random")[0]
    module = LinearProbe(
        build_head("bn_linear", encoder.feature_dim, CLASSES),
        optimizer=OptimizerSection(),
        schedule=np.ones(2),
        num_classes=CLASSES,
        evaluation_names=[],
        class_weights=torch.ones(CLASSES),
        multi_label=several,
        encoder=encoder,
    )
    side = encoder.spec.vision.image_size
    target = torch.zeros(BATCH, CLASSES, dtype=torch.bool) if several else torch.arange(BATCH)
    run_steps(module, {"image": torch.zeros(BATCH, 3, side, side).to("meta"), "target": target.to("meta")}, reads)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_bank(loss, optimizer, reads):
    heads = build_grid(["one", "two"], [0.1, 0.2], [0.0, 0.05])
    bank = HeadBank(
        heads, {"one": 6, "two": 8}, CLASSES, optimizer=optimizer, class_weights=torch.ones(CLASSES), loss=loss
    )
    bank.to("meta")
    target = torch.zeros(BATCH, CLASSES) if loss == "bce" else torch.arange(BATCH)
    features = {"one": torch.zeros(BATCH, 6).to("meta"), "two": torch.zeros(BATCH, 8).to("meta")}
    target = target.to("meta")
    with NoCopies():
        assert bank.train_step(features, target, 0.5).shape == (len(heads),)
    assert reads[0] == 0
