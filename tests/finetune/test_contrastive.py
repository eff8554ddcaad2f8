"""Contrastive fine-tuning against open_clip's loss and against zero-shot of the trained towers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from eva_clip import build_classifier
from eva_clip.models import build_model
from finetune.__main__ import main
from finetune.contrastive import ClassTexts, attach_texts, contrastive_loss
from finetune.finished_run import FinishedRun

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
    loss, logits = contrastive_loss(model.forward_features(images), target, model.texts)
    texts = towers.encode_text(tokenize([NAMES[label] for label in target], towers.spec.text.context_length))
    scale = towers.logit_scale.exp().clamp(max=100)
    expected = ClipLoss()(F.normalize(towers.encode_image(images), dim=1), F.normalize(texts, dim=1), scale)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert logits.shape == (6, 4)


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
