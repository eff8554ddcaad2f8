"""Heads that a fine-tune starts from: at learning rate 0 it scores what they scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import finetune.__main__
import probes.linear
import probes.logistic
import probes.zeroshot
from finetune.head_start import fold
from probes.heads import build_head

REPO = Path(__file__).resolve().parents[2]


def read_scores(folder: str) -> dict[str, float]:
    score = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))["scores"][0]
    return {"top1": score["top1"], "top5": score["top5"]}


@pytest.fixture
def data(png_digits, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("probe.yaml").write_text("compute: {precision: fp32}\n")
    images = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0"]
    return [*tiny_model.overrides, *images]


@pytest.fixture
def still(data):
    """Fine-tunes one epoch without learning."""

    def run(*more: str, code: int = 0) -> dict[str, float]:
        argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), *data, "data.format=folder", "ema.decay=null"]
        argv += ["optimizer.lr=0.0", "schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.global_batch=12"]
        argv += ["trainer.micro_batch=12", "run.dir=finetune", "run.on_existing=overwrite"]
        assert finetune.__main__.main([*argv, *more]) == code
        return read_scores("finetune") if code == 0 else {}

    return run


def test_a_batch_norm_folds_into_the_linear_layer():
    torch.manual_seed(0)
    head = build_head("bn_linear", 6, 3)
    for _ in range(5):
        head(3 * torch.randn(20, 6) + 1)
    weight, bias = fold(head.state_dict())
    features = torch.randn(4, 6)
    torch.testing.assert_close(features @ weight.T + bias, head.eval()(features), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bn_linear", "linear"])
def test_a_probes_run_folder(data, still, kind):
    recipe = str(REPO / "recipes" / "custom" / "linear_folder.yaml")
    small = ["trainer.global_batch=12", "trainer.micro_batch=12", "trainer.precision=fp32", "schedule.epochs=5"]
    small += ["schedule.warmup_epochs=1", f"head.kind={kind}", "run.dir=probe"]
    assert probes.linear.main([recipe, *data, *small]) == 0
    assert still("head.start=probe", "head.probe=probe") == pytest.approx(read_scores("probe"))


def test_a_probe_fitted_first(data, still, capsys):
    assert (
        probes.logistic.main(["probe.yaml", *data, "data.holdout=0.25", "logistic.refit=false", "run.dir=probe"]) == 0
    )
    found = still("head.start=linear_probe", "data.holdout=0.25")
    assert found == pytest.approx(read_scores("probe"))
    assert "the head starts from a probe fitted first (C = " in capsys.readouterr().out


def test_a_probe_fitted_first_has_not_seen_the_holdout_that_is_reported(data, still):
    without_test = ["data.test=null", "data.holdout=0.25"]
    assert probes.logistic.main(["probe.yaml", *data, *without_test, "run.dir=probe"]) == 0
    found = still("head.start=linear_probe", *without_test)
    assert found == pytest.approx(read_scores("probe"))


def test_the_texts_of_the_classes(data, still):
    assert probes.zeroshot.main(["probe.yaml", *data, "run.dir=zeroshot"]) == 0
    assert still("head.start=zero_shot") == pytest.approx(read_scores("zeroshot"))


def test_a_probe_that_does_not_fit_is_refused(data, still, png_digits, capsys):
    assert probes.logistic.main(["probe.yaml", *data, "features.pool=gap", "run.dir=probe"]) == 0
    still("head.start=probe", "head.probe=probe", code=2)
    assert "features.pool is 'gap'; expected 'cls'" in capsys.readouterr().err
    still("head.start=probe", "head.probe=absent", code=2)
    assert "no head at absent; expected the run folder of a probe" in capsys.readouterr().err
    still("head.start=zero_shot", "head.pool=gap", code=2)
    assert "set head.pool=cls and head.kind=linear" in capsys.readouterr().err
    still("head.start=probe", code=2)
    assert "give a probe with start=probe alone" in capsys.readouterr().err
