"""Finished fine-tunes and checkpoints on other images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import finetune.__main__
from eva_clip.transforms import build_eval_transform, to_rgb
from finetune.evaluate import main

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(png_digits, tmp_path_factory):
    """A fine-tune with a BatchNorm head, which its export folds."""
    base = tmp_path_factory.mktemp("evaluate")
    argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), "data.format=folder", "data.workers=0"]
    argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "head.kind=bn_linear", "ema.decay=null"]
    argv += ["head.start=fresh"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=16", "schedule.epochs=2", "schedule.warmup_epochs=0"]
    assert finetune.__main__.main([*argv, f"run.dir={base / 'run'}"]) == 0
    return base / "run"


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_runs_own_test_gives_the_runs_own_score(finished, tmp_path):
    assert main([str(finished), f"run.dir={tmp_path / 'again'}"]) == 0
    again, first = read_result(tmp_path / "again")["scores"][0], read_result(finished)["scores"][0]
    for key in ("top1", "top5", "samples"):
        assert again[key] == pytest.approx(first[key])
    assert again["loss"] == pytest.approx(first["loss"], abs=1e-4)
    own, other = ((folder / "predictions.csv").read_text().splitlines() for folder in (finished, tmp_path / "again"))
    assert [line.rsplit(",", 1)[0] for line in own] == [line.rsplit(",", 1)[0] for line in other]


def test_fewer_classes_are_found_by_name(finished, png_digits, tmp_path):
    for name in ("three", "zero"):  # positions 1 and 3 of the run's classes
        shutil.copytree(png_digits.test / name, tmp_path / "some" / name)
    assert main([str(finished), f"data.test={tmp_path / 'some'}", f"run.dir={tmp_path / 'run'}"]) == 0
    result = read_result(tmp_path / "run")
    assert result["classes"] == png_digits.classes
    assert "no image of 2 of the 4 classes" in result["notes"][0]
    some, whole = (
        {line.rsplit(",", 1)[0] for line in (folder / "predictions.csv").read_text().splitlines()}
        for folder in (tmp_path / "run", finished)
    )
    assert len(some) == 1 + 10
    assert some <= whole


def test_unknown_classes_and_empty_targets_are_named(finished, png_digits, tmp_path, capsys):
    shutil.copytree(png_digits.test / "zero", tmp_path / "other" / "nothing")
    assert main([str(finished), f"data.test={tmp_path / 'other'}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "not trained on: nothing; expected some of one, three, two, zero" in capsys.readouterr().err
    assert main([str(tmp_path / "other")]) == 2
    assert "holds no finished fine-tune" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: EVA01-CLIP-nano}}\ndata: {{test: {png_digits.test}, workers: 0}}\n")
    assert main([str(recipe)]) == 2
    assert "which has no classifier; name a checkpoint file" in capsys.readouterr().err


def test_a_checkpoint_by_recipe(finished, png_digits, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: EVA01-CLIP-nano}\nhead: {pool: cls}\ndata: {workers: 0}\n")
    argv = [f"model.weights={finished / 'model.safetensors'}", f"data.test={png_digits.test}"]
    assert main([str(recipe), *argv, f"run.dir={tmp_path / 'run'}"]) == 0
    assert read_result(tmp_path / "run")["scores"][0]["top1"] == pytest.approx(
        read_result(finished)["scores"][0]["top1"]
    )


@pytest.mark.parametrize("kind", ["run", "test"])
def test_answers_are_among_the_classes_of_the_run_or_of_test(finished, png_digits, tmp_path, kind, capsys):
    """Against logits computed image by image through timm's own reading of the exported folder."""
    names = ["three", "zero"]
    for name in names:
        shutil.copytree(png_digits.test / name, tmp_path / "some" / name)
    view = build_eval_transform(64)
    paths = sorted((tmp_path / "some").glob("*/*.png"))
    model = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.stack([view(to_rgb(Image.open(path))) for path in paths]))
    columns = [png_digits.classes.index(name) for name in names]
    true = torch.tensor([png_digits.classes.index(path.parent.name) for path in paths])
    of_test = [columns[i] for i in logits[:, columns].argmax(dim=1).tolist()]
    answers = {"run": logits.argmax(dim=1).tolist(), "test": of_test}
    top1 = {key: 100 * float((torch.tensor(found) == true).double().mean()) for key, found in answers.items()}
    assert top1["run"] < top1["test"], "else the two could not be told apart"

    argv = [str(finished), f"data.test={tmp_path / 'some'}", f"run.dir={tmp_path / 'run'}"]
    assert main([*argv, f"data.classes_of={kind}"]) == 0
    result, out = read_result(tmp_path / "run"), capsys.readouterr().out
    score = result["scores"][0]
    assert score["top1"] == pytest.approx(top1[kind])
    other = {"run": "test", "test": "run"}[kind]
    assert f"(data.classes_of={kind})" in out
    assert any(f"data.classes_of={other}" in note and f"{top1[other]:.2f}" in note for note in result["notes"])
    assert result["classes"] == (png_digits.classes if kind == "run" else names)
    rows = csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines())
    predicted = {row["key"]: row["predicted"] for row in rows}
    expected = [png_digits.classes[answer] for answer in answers[kind]]
    assert [predicted[f"{path.parent.name}/{path.name}"] for path in paths] == expected
    if kind == "test":
        loss = torch.nn.functional.cross_entropy(logits[:, columns], torch.tensor([columns.index(t) for t in true]))
        assert score["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_the_encoder_computes_in_the_given_precision_and_in_the_runs_own_without_one(finished, tmp_path, monkeypatch):
    import timm.layers.mlp
    import torch

    inside: set[torch.dtype] = set()
    forward = timm.layers.mlp.Mlp.forward
    monkeypatch.setattr(
        timm.layers.mlp.Mlp, "forward", lambda self, x: (inside.add(self.fc1(x).dtype), forward(self, x))[1]
    )
    losses = {}
    for precision, asked in (("fp32", []), ("bf16", ["compute.precision=bf16"])):  # the run was trained in fp32
        inside.clear()
        assert main([str(finished), *asked, f"run.dir={tmp_path / precision}"]) == 0
        assert inside == {torch.float32 if precision == "fp32" else torch.bfloat16}
        result = read_result(tmp_path / precision)
        assert result["facts"]["precision"].startswith(f"{precision} (as asked; ")
        losses[precision] = result["scores"][0]["loss"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
