"""Contrastive fine-tuning against open_clip's loss and against zero-shot of the trained towers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from eva_clip import build_classifier
from eva_clip.models import build_model
from finetune.__main__ import main
from finetune.contrastive import ClassTexts, attach_texts
from finetune.contrastive_step import ContrastiveStep
from finetune.drop_path import skip_dropped_paths
from finetune.finished_run import FinishedRun
from finetune.fit import weights_of
from finetune.module import FinetuneModule
from finetune.sections import FinetuneRecipe
from probes.recipe import load_recipe

REPO = Path(__file__).resolve().parents[2]
NANO = "EVA01-CLIP-nano"
NAMES = ["zero", "one", "two", "three"]
CONTRASTIVE = [
    "head.pool=cls",
    "head.start=zero_shot",
    "head.objective=contrastive",
    "head.prompt=the number {}",
    "regularisation.label_smoothing=0",
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    classifier = build_classifier(NANO, 4, pool="cls", checkpoint="pretrained")
    towers, _ = build_model(NANO, "pretrained")
    attach_texts(classifier, ClassTexts(towers, NAMES, length=3.0))
    return classifier


@pytest.fixture
def images():
    size = 64
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_clips(model, images):
    images = F.interpolate(images, size=model.spec.vision.image_size)
    towers, _ = build_model(NANO, "pretrained")
    from eva_clip.tokenizer import tokenize

    target = torch.tensor([2, 0, 2, 3, 1, 0])
    scored = ContrastiveStep(model, model.texts).score(images, target, 6, part=0, parts=1, rank=0, world_size=1)
    loss, logits = scored.total / 6, scored.logits
    texts = towers.encode_text(tokenize([NAMES[label] for label in target], towers.spec.text.context_length))
    scale = towers.logit_scale.exp().clamp(max=100)
    expected = ClipLoss()(F.normalize(towers.encode_image(images), dim=1), F.normalize(texts, dim=1), scale)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert logits.shape == (6, 4)


def gradients_of(model, images, target, sizes, missing=()):
    """Loss, logits and gradients of one step of 8 images in micro-batches; `missing` images could not be read."""
    torch.manual_seed(5)  # of dropped paths
    model = copy.deepcopy(model).train()
    step = ContrastiveStep(model, model.texts)
    total = 0.0
    parts = list(torch.arange(len(target)).split(sizes))
    for part, rows in enumerate(parts):
        read = torch.tensor([row for row in rows.tolist() if row not in missing], dtype=torch.int64)
        scored = step.score(images[read], target[read], sizes, part, len(parts), rank=0, world_size=1)
        scored.total.backward()  # before the last micro-batch a zero
        total += scored.total.item()
    return total, scored, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("missing", [(), (1, 4, 5)])
@pytest.mark.parametrize("names", [NAMES, [f"{first} {second}" for first in NAMES for second in NAMES]])
def test_objective_and_gradient_do_not_depend_on_the_micro_batch(images, names, missing):
    """With fewer classes than images and with more; in micro-batches of one image, some of which cannot be read."""
    torch.manual_seed(0)
    model = build_classifier(NANO, len(names), pool="cls", checkpoint="pretrained", drop_path_rate=0.0)
    towers, _ = build_model(NANO, "pretrained")
    attach_texts(model, ClassTexts(towers, names, length=3.0))
    images = F.interpolate(images, size=model.spec.vision.image_size)[[0, 1, 2, 3, 4, 5, 0, 1]].flip(0)
    target = torch.tensor([2, 0, 2, 3, 1, 0, 3, 3])
    whole, wanted, gradients = gradients_of(model, images, target, 8, missing)
    kept = [row for row in range(8) if row not in missing]
    torch.testing.assert_close(wanted.target, target[kept])
    assert float(wanted.losses.sum()) == pytest.approx(whole, rel=1e-5)
    assert wanted.logits.shape == (len(kept), len(names))
    for size in (4, 2, 1):
        total, scored, found = gradients_of(model, images, target, size, missing)
        assert total == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(scored.logits, wanted.logits, rtol=1e-5, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_recomputation_drops_the_same_paths(images):
    """The gradient is that of the graph that was kept: a second forward pass with other draws would differ."""
    torch.manual_seed(0)
    model = build_classifier(NANO, 4, pool="cls", checkpoint="pretrained", drop_path_rate=0.5)
    towers, _ = build_model(NANO, "pretrained")
    attach_texts(model, ClassTexts(towers, NAMES, length=3.0))
    skip_dropped_paths(model.tower)
    images, target = F.interpolate(images, size=model.spec.vision.image_size), torch.tensor([2, 0, 2, 3, 1, 0])
    found = gradients_of(model, images, target, 3)[2]
    torch.manual_seed(5)
    kept = copy.deepcopy(model).train()
    features = torch.cat([kept.forward_features(part) for part in images.split(3)])
    embeddings, texts = kept.texts.embed_images(features), kept.texts.embed(target)
    pairs = kept.texts.scale() * embeddings @ texts.T
    (3 * F.cross_entropy(pairs, torch.arange(6)) + 3 * F.cross_entropy(pairs.T, torch.arange(6))).backward()
    for name, p in kept.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


def test_the_head_is_zero_shot_of_the_towers(model, images):
    images = F.interpolate(images, size=model.spec.vision.image_size)
    towers, _ = build_model(NANO, "pretrained")
    from eva_clip.tokenizer import tokenize

    with torch.no_grad():
        embeddings = towers.encode_image(images)
        texts = towers.encode_text(tokenize(NAMES, towers.spec.text.context_length), normalize=True)
        expected = towers.logit_scale.exp().clamp(max=100) / 3.0 * embeddings @ texts.T
        torch.testing.assert_close(model(images), expected, atol=1e-3, rtol=1e-4)


def test_a_run_trains_both_towers_and_its_folder_opens_in_timm(png_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(REPO / "recipes" / "custom" / "finetune_folder.yaml")
    common = ["data.workers=0", "trainer.global_batch=8", "trainer.precision=fp32", "augment.policy=null"]
    common += ["schedule.epochs=3", "schedule.warmup_epochs=0", "optimizer.lr=1e-3", "ema.decay=0.5", "run.dir=run"]
    arguments = [f"data.train={png_digits.train}", f"model.name={NANO}", *common, *CONTRASTIVE]
    assert main([recipe, *arguments]) == 0
    rows = [json.loads(line) for line in Path("run/log.txt").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    run = FinishedRun(Path("run"))
    assert not any(name.startswith("texts.") for name in run.end_state())
    model = run.build()
    split = run.splits.selection or run.splits.test
    for kind in ("raw", "ema"):  # each file's head belongs to its own weights
        model.load_state_dict(run.end_state(kind))
        prefix = "ema_" if kind == "ema" else ""
        assert run.score(model, split)["acc1"] == pytest.approx(rows[-1][f"{prefix}{split.name}_acc1"])
    start, end = run.start_state(), run.end_state("raw")
    assert not torch.equal(start["head.weight"], end["head.weight"])
    assert not torch.equal(start["tower.blocks.0.attn.qkv.weight"], end["tower.blocks.0.attn.qkv.weight"])
    opened = timm.create_model("local-dir:run", pretrained=True)
    assert opened.get_classifier().out_features == 4


def test_the_average_moves_with_the_model(model, tmp_path, monkeypatch):
    """After training Lightning moves the module off its device; the head of the averaged towers is still made."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(REPO / "recipes" / "quickstart" / "finetune_contrastive.yaml", [], FinetuneRecipe)
    module = FinetuneModule(model, recipe, np.ones(1), [])
    module.to("meta")
    module.on_fit_start()
    assert {tensor.device.type for tensor in module.ema.average.values()} == {"meta"}
    module.to_empty(device="cpu")
    module.model.texts.tokens.zero_()  # else they are what lay in memory
    assert {tensor.device.type for tensor in module.ema.average.values()} == {"cpu"}
    assert weights_of(module, "ema").keys() == model.state_dict().keys()


def test_what_has_no_place_is_refused_by_name(png_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = str(REPO / "recipes" / "custom" / "finetune_folder.yaml")
    arguments = [f"data.train={png_digits.train}", f"model.name={NANO}", *CONTRASTIVE, "augment.mixup=0.2"]
    assert main([recipe, *arguments, "tune.what=lora"]) == 2
    error = capsys.readouterr().err
    assert "augment.mixup is 0.2; expected 0.0" in error
    assert "tune.what is 'lora'; expected 'all'" in error
    assert main([recipe, *arguments, "head.start=fresh"]) == 2
    assert "set head.start=zero_shot" in capsys.readouterr().err
