"""Heads that start from texts, weighted classes, and repetitions over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from probes.class_weights import balanced_weights
from probes.heads import build_head
from probes.linear import main
from probes.module import LinearProbe
from probes.sections import OptimizerSection

REPO = Path(__file__).resolve().parents[2]


def test_balanced_weights_are_scikit_learns():
    targets = np.array([0] * 7 + [1] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets) * 3 / 4  # 4 classes here
    found = balanced_weights(torch.from_numpy(np.bincount(targets)))
    assert found.tolist() == pytest.approx([expected[0], expected[1], 0.0, expected[2]])


@pytest.fixture
def argv(png_digits, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0"]
    small = ["trainer.global_batch=12", "trainer.micro_batch=12", "schedule.epochs=2", "schedule.warmup_epochs=0"]
    recipe = REPO / "recipes" / "custom" / "linear_folder.yaml"
    return [str(recipe), *tiny_model.overrides, *data, *small]


def read_result(folder: str = "run") -> dict:
    return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def test_without_learning_a_zero_shot_head_is_zero_shot(argv):
    features = ["features.pool=cls", "features.projected=true", "features.l2norm=true"]
    head = ["head.kind=linear", "head.start=zero_shot", "optimizer.lr=0.0", "baselines.zero_shot=true"]
    assert main([*argv, *features, *head, "data.holdout=0.0", "run.dir=run"]) == 0
    result = read_result()
    (zero_shot,) = (item for item in result["baselines"] if item["name"] == "zero-shot")
    assert result["scores"][0]["top1"] == pytest.approx(zero_shot["top1"])


def test_a_zero_shot_head_on_other_features_is_refused(argv, capsys):
    assert main([*argv, "head.start=zero_shot", "run.dir=run"]) == 2
    assert "features.projected=true, features.l2norm=true and head.kind=linear" in capsys.readouterr().err
    assert main([*argv, "run.seeds=[0,1]", "features.mode=online", "run.dir=run"]) == 2
    assert "set features.mode=cached" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*argv, "trainer.sync_batch_norm=true", "run.dir=run"]) == 2
        assert "trainer.sync_batch_norm is true and there is no GPU" in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_loss_weighs_samples_by_their_class():
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(20, 8, generator=generator), torch.tensor([0] * 14 + [1] * 5 + [2])
    weights = balanced_weights(targets.bincount())
    probe = LinearProbe(
        build_head("linear", 8, 3),
        optimizer=OptimizerSection(),
        schedule=np.ones(1),
        num_classes=3,
        evaluation_names=[],
        class_weights=weights,
    )
    batch = {"features": features, "target": targets}
    loss = probe.training_step(batch, 0)
    probability = probe(batch).softmax(dim=1).detach().double().numpy()
    assert float(loss) == pytest.approx(log_loss(targets, probability, sample_weight=weights[targets]), rel=1e-5)


def test_seeds_are_the_runs_of_each_seed(argv, capsys):
    assert main([*argv, "run.seeds=[3,4]", "run.dir=both"]) == 0
    out = capsys.readouterr().out
    repeats = read_result("both")["repeats"]
    for row in repeats:
        of_seed = [f"run.seed={row['seed']}", f"data.holdout_seed={row['seed']}"]
        assert main([*argv, *of_seed, f"run.dir=seed{row['seed']}"]) == 0
        assert read_result(f"seed{row['seed']}")["scores"][0]["top1"] == pytest.approx(row["top1"])
    assert read_result("both")["scores"] == read_result("seed3")["scores"]
    assert "over 2 seed(s)" in out
    assert len(list(Path("logs/features").glob("*/key.json"))) == 2, "one extraction of train, one of test"
