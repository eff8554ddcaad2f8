"""Methods on stored features of images with several labels: digits with their name and their parity."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import probes.knn
import probes.linear
import probes.logistic
import probes.ridge
from probes.extraction import load_tables
from probes.method_sections import LogisticRecipe
from probes.module import LinearProbe
from probes.recipe import load_recipe
from probes.sections import OptimizerSection
from probes.splits import prepare_splits

COMMANDS = {"logistic": probes.logistic.main, "knn": probes.knn.main, "ridge": probes.ridge.main}
PARITY = {"zero": "even", "two": "even", "one": "odd", "three": "odd"}


@pytest.fixture
def argv(png_digits, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with png_digits.csv.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table = png_digits.csv.with_name("several.csv")
    lines = [f"{row['path']},{row['label']}|{PARITY[row['label']]},{row['split']}" for row in rows]
    table.write_text("\n".join(["path,label,split", *lines]) + "\n", encoding="utf-8")
    Path("recipe.yaml").write_text("compute: {precision: fp32}\n")
    data = ["data.format=csv", f"data.train={table}", "data.labels=multi", "data.holdout=0.25", "data.workers=0"]
    return ["recipe.yaml", *tiny_model.overrides, *data, "features.pool=gap"]


def read_precisions() -> dict[str, float]:
    lines = Path("run/average_precision.csv").read_text(encoding="utf-8").splitlines()
    return {row["class"]: float(row["average_precision"]) for row in csv.DictReader(lines)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_method_is_chosen_and_scored_by_average_precision(argv, name, capsys):
    assert COMMANDS[name]([*argv, "run.dir=run"]) == 0
    assert "mean average precision" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert result["classes"] == ["even", "odd", "one", "three", "two", "zero"]
    precisions = read_precisions()
    assert result["measured"]["mean_average_precision"] == pytest.approx(np.mean(list(precisions.values())), abs=1e-3)
    rows = list(csv.DictReader(Path("run/candidates.csv").read_text(encoding="utf-8").splitlines()))
    best = max(rows, key=lambda row: float(row["mean_average_precision"]))
    score = result["scores"][0]
    assert score["setting"].endswith(f"= {float(next(iter(best.values()))):.6g}")
    assert (score["name"], score["split"], score["chosen_by"]) == ("selected", "test", "holdout")
    low, high = result["interval"]
    assert low < result["measured"]["mean_average_precision"] < high
    assert f'<td class="num">{score["setting"]}</td>' in Path("run/report.html").read_text(encoding="utf-8")
    assert Path("run/head.safetensors").exists() == (name != "knn")
    predictions = list(csv.DictReader(Path("run/predictions.csv").read_text(encoding="utf-8").splitlines()))
    assert len(predictions) == score["samples"]
    of_even = [float(row["probability of even" if name == "logistic" else "score of even"]) for row in predictions]
    found = average_precision_score(["even" in row["labels"].split("|") for row in predictions], of_even)
    assert 100 * found == pytest.approx(precisions["even"], abs=0.1), "the table's six digits may tie"
    assert precisions["even"] > 60, "half of the digits are even"


def test_logistic_is_a_binary_fit_of_each_label(argv):
    more = ["data.holdout=0.0", "logistic.fixed=0.5", "run.dir=run"]
    assert probes.logistic.main([*argv, *more]) == 0
    recipe = load_recipe("recipe.yaml", [*argv[1:], *more], LogisticRecipe)
    splits = prepare_splits(recipe.data, multi_label=True)
    tables = load_tables(recipe, splits)
    features = {name: table.features.double().numpy() for name, table in tables.items()}
    for position, name in enumerate(splits.classes):
        train, test = (split.multi_hot[:, position] for split in (splits.train, splits.test))
        model = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(features["train"], train)
        expected = 100 * average_precision_score(test, model.decision_function(features["test"]))
        assert read_precisions()[name] == pytest.approx(expected, abs=1.0)


def test_what_is_drawn_by_class_is_refused(argv, capsys):
    assert probes.ridge.main([*argv, "run.seeds=[0,1]"]) == 2
    assert "data.labels is 'multi' with run.seeds or few_shot.shots" in capsys.readouterr().err
    assert not Path("logs").exists()


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_linear_probe_selects_by_average_precision(argv, mode):
    recipe = [argument for argument in argv if argument != "recipe.yaml" and not argument.startswith("compute.")]
    Path("linear.yaml").write_text("trainer: {precision: fp32, global_batch: 16, micro_batch: 16}\n")
    more = [f"features.mode={mode}", "schedule.epochs=20", "schedule.warmup_epochs=0", "optimizer.lr=0.3"]
    assert probes.linear.main(["linear.yaml", *recipe, *more, "head.class_weights=auto", "run.dir=run"]) == 0
    rows = [json.loads(line) for line in Path("run/log.txt").read_text(encoding="utf-8").splitlines()]
    best = max(rows, key=lambda row: row["holdout_mean_ap"])
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    score = result["scores"][0]
    assert (score["name"], score["epoch"], score["chosen_by"]) == ("selected", best["epoch"], "holdout")
    assert [score["name"] for score in result["scores"]] == ["selected", "last", "best"]
    assert Path("run/report.html").read_text(encoding="utf-8").count("<svg") >= 2
    assert result["measured"]["mean_average_precision"] == pytest.approx(best["test_mean_ap"], abs=0.01)
    assert np.mean(list(read_precisions().values())) == pytest.approx(best["test_mean_ap"], abs=0.01)
    if mode == "cached":  # on new crops every epoch a random encoder has nothing to learn from
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_probes_loss_is_the_formula():
    """Binary cross-entropy in float64, positives weighted."""
    torch.manual_seed(0)
    logits, target, weights = torch.randn(5, 3), torch.rand(5, 3) > 0.5, torch.tensor([1.0, 2.0, 3.0])
    module = LinearProbe(
        torch.nn.Identity(),
        optimizer=OptimizerSection(),
        schedule=np.ones(1),
        num_classes=3,
        evaluation_names=[],
        class_weights=weights,
        multi_label=True,
    )
    p = logits.double().sigmoid()
    by_hand = -(weights.double() * target * p.log() + ~target * (1 - p).log()).mean()
    assert float(module._losses(logits, target).mean()) == pytest.approx(float(by_hand), rel=1e-6)


def test_what_a_linear_probe_cannot_have_with_several_labels(argv, capsys):
    Path("linear.yaml").write_text("")
    for setting, remedy in (("run.seeds=[0,1]", "leave run.seeds out"), ("head.start=zero_shot", "head.start=fresh")):
        more = ["features.mode=cached", "head.kind=linear"]
        more += (
            ["features.pool=cls", "features.projected=true", "features.l2norm=true"] if "zero_shot" in setting else []
        )
        assert probes.linear.main(["linear.yaml", *argv[1:], *more, setting, "run.dir=run"]) == 2
        assert remedy in capsys.readouterr().err
    assert not Path("run").exists()
