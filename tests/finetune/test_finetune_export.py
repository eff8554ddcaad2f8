"""A finished run folder opens in plain timm with the run's own logits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from eva_clip import build_classifier
from eva_clip.transforms import build_eval_transform, to_rgb
from finetune.__main__ import main

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "quickstart" / "finetune.yaml"


@pytest.mark.parametrize(("pool", "head"), [("gap", "linear"), ("cls", "bn_linear")])
def test_timm_gives_the_logits_of_the_run(png_digits, tmp_path, monkeypatch, pool, head):
    monkeypatch.chdir(tmp_path)
    argv = [str(RECIPE), "data.format=folder", f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=16", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert main([*argv, "head.start=fresh", f"head.pool={pool}", f"head.kind={head}", "run.dir=run"]) == 0
    ours = build_classifier("EVA01-CLIP-nano", 4, pool=pool, head=head, checkpoint="run/last_ema.safetensors")
    assert not ours.load_report.missing, "head and fc_norm are the file's"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()

    view = build_eval_transform(ours.spec.vision.image_size, ours.spec.image_mean, ours.spec.image_std)
    paths = sorted(png_digits.test.rglob("*.png"))
    images = torch.stack([view(to_rgb(Image.open(path))) for path in paths])
    with torch.no_grad():
        expected, found = ours(images), theirs(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std(dim=0).min() > 1e-4, "different images have different logits"

    classes = json.loads(Path("run/result.json").read_text(encoding="utf-8"))["classes"]
    with Path("run/predictions.csv").open(encoding="utf-8") as stream:
        rows = {row["key"]: row for row in csv.DictReader(stream)}
    for path, logits in zip(paths, found, strict=True):
        row = next(row for key, row in rows.items() if key.endswith(f"{path.parent.name}/{path.name}"))
        assert row["predicted"] == classes[int(logits.argmax())]
        assert float(row["confidence"]) == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)
    settings = timm.data.resolve_model_data_config(theirs)
    assert tuple(settings["input_size"]) == (3, ours.spec.vision.image_size, ours.spec.vision.image_size)
    assert settings["mean"] == pytest.approx(ours.spec.image_mean)


def test_a_rate_of_zero_changes_nothing(png_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(RECIPE), "data.format=folder", f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=16", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert main([*argv, "head.start=fresh", "optimizer.lr=0.0", "run.dir=run"]) == 0
    row = json.loads(Path("run/log.txt").read_text(encoding="utf-8").splitlines()[-1])
    assert row["train_lr"] == row["train_min_lr"] == 0
    before = build_classifier("EVA01-CLIP-nano", 4, checkpoint="pretrained").tower.state_dict()
    after = build_classifier("EVA01-CLIP-nano", 4, checkpoint="run/last_raw.safetensors").tower.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_run_goes_on_from_the_weights_of_another(png_digits, tmp_path, monkeypatch):
    """Its raw weights and its head, as `model.weights` of a second run."""
    monkeypatch.chdir(tmp_path)
    argv = [str(RECIPE), "data.format=folder", f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=16", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert main([*argv, "head.start=fresh", "optimizer.lr=1e-3", "run.dir=one"]) == 0
    more = ["head.start=checkpoint", "model.weights=one/last_raw.safetensors", "optimizer.lr=0.0", "run.dir=two"]
    assert main([*argv, *more]) == 0
    raw = [
        next(row for row in json.loads(Path(name, "result.json").read_text())["scores"] if row["name"] == "last_raw")
        for name in ("one", "two")
    ]
    assert raw[1]["top1"] == raw[0]["top1"]
    assert raw[1]["loss"] == pytest.approx(raw[0]["loss"], rel=1e-5)
