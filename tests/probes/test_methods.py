"""Methods on stored features against scikit-learn and scipy, and the frame that chooses, repeats and reports."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import probes.knn
import probes.logistic
import probes.ridge
from probes.confusion import mean_recall
from probes.draws import choose_shots, whole_train, with_seed, with_shots
from probes.feature_run import LinearScorer, Samples
from probes.intervals import mean_interval, wilson_interval
from probes.knn import Neighbours
from probes.method_sections import KnnSection, MethodRecipe, RidgeSection
from probes.recipe import load_recipe
from probes.results import Predictions
from probes.ridge import Ridge
from probes.sections import DataSection
from probes.splits import choose_holdout, prepare_splits

COMMANDS = {"logistic": probes.logistic.main, "knn": probes.knn.main, "ridge": probes.ridge.main}


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, torch.Tensor]:
    """1,000 digits to train, the other 797 to score."""
    data = load_digits()
    features, targets = torch.from_numpy(data.data).float(), torch.from_numpy(data.target).long()
    return Samples("train", features[:1000], targets[:1000], 10), features[1000:]


@pytest.mark.parametrize("k", [10, 100])
def test_neighbours_vote_as_in_scikit_learn(digits, k):
    train, queries = digits
    scorer = Neighbours(KnnSection()).fit(train, k)
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    reference.fit(train.features.double().numpy(), train.targets.numpy())
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(scorer(queries).softmax(dim=1), expected, atol=2e-4, rtol=0)


def test_more_neighbours_than_images_are_all_of_them(digits):
    train, queries = digits
    few = Samples("train", train.features[:7], train.targets[:7], 10)
    assert [k for k, _ in Neighbours(KnnSection()).path(few)] == [7.0]
    assert Neighbours(KnnSection()).fit(few, 200)(queries).isfinite().all()


@pytest.mark.parametrize("rows", [1000, 30])
@pytest.mark.parametrize("penalty", [1e-4, 1e-1])
def test_ridge_is_scikit_learns(digits, rows, penalty):
    train, queries = digits
    part = Samples("train", train.features[:rows], train.targets[:rows], 10)
    centred = (part.features - part.features.mean(dim=0)).double().numpy()
    alpha = penalty * np.square(centred).sum() / centred.shape[1]
    reference = SklearnRidge(alpha=alpha, solver="svd").fit(part.features.double().numpy(), np.eye(10)[part.targets])
    expected = torch.from_numpy(reference.predict(queries.double().numpy())).float()
    torch.testing.assert_close(Ridge(RidgeSection()).fit(part, penalty)(queries), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (19, 20), (254, 376), (0, 50_000)])
def test_the_interval_of_a_proportion_is_scipys(right, total, level):
    found = stats.binomtest(right, total).proportion_ci(level, method="wilson")
    low, high = wilson_interval(right, total, level)
    assert (low, high) == pytest.approx((100 * found.low, 100 * found.high), abs=1e-9)
    assert low < high
    assert (low == 0) == (right == 0)
    assert (high == 100) == (right == total)


def test_the_interval_of_a_proportion_is_the_published_one():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3 (score without continuity correction).
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct, total) == pytest.approx((100 * low, 100 * high), abs=0.006)
    assert np.isnan(wilson_interval(0, 0)).all()


def test_interval_over_seeds_is_students():
    values = [67.0, 68.5, 66.2]
    mean, half = mean_interval(values)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected)
    assert np.isnan(mean_interval([1.0])[1])


def test_mean_recall_is_balanced_accuracy():
    generator = np.random.default_rng(0)
    targets, predicted = generator.integers(1, 4, 60), generator.integers(1, 4, 60)
    predictions = Predictions([""] * 60, targets, predicted, np.zeros(60), np.zeros(60))
    assert mean_recall(predictions) == pytest.approx(100 * balanced_accuracy_score(targets, predicted))


class TestDraws:
    @pytest.fixture
    def splits(self, png_digits):
        return prepare_splits(DataSection(train=str(png_digits.train), test=str(png_digits.test), holdout=0.25))

    def test_shots_are_nested_and_do_not_depend_on_order(self, splits):
        pool = whole_train(splits)
        assert pool.keys == sorted(pool.source.keys)
        masks = {shots: choose_shots(pool.targets, pool.keys, shots, 3) for shots in (1, 2, 4, 100)}
        for few, more in ((1, 2), (2, 4), (4, 100)):
            assert not (masks[few] & ~masks[more]).any()
            assert np.bincount(pool.targets[masks[few]]).tolist() == [few] * 4
        assert masks[100].all()
        reversed_mask = choose_shots(pool.targets[::-1], pool.keys[::-1], 2, 3)[::-1]
        assert (reversed_mask == masks[2]).all()
        assert (choose_shots(pool.targets, pool.keys, 2, 4) != masks[2]).any()

    @pytest.mark.parametrize(("shots", "held"), [(1, 0), (2, 1), (3, 1), (4, 1), (8, 2)])
    def test_the_holdout_comes_out_of_the_shots(self, splits, shots, held):
        drawn = with_shots(splits, shots, 0)
        assert np.bincount(drawn.train.targets).tolist() == [shots - held] * 4
        assert (drawn.selection is None) == (held == 0)
        if held:
            assert np.bincount(drawn.selection.targets).tolist() == [held] * 4
            assert not set(drawn.selection.keys) & set(drawn.train.keys)
        assert drawn.test is splits.test

    def test_another_seed_is_the_holdout_of_that_seed(self, splits, png_digits):
        again = with_seed(splits, 0.25, 7)
        data = DataSection(train=str(png_digits.train), test=str(png_digits.test), holdout=0.25, holdout_seed=7)
        fresh = prepare_splits(data)
        assert again.train.keys == fresh.train.keys
        assert again.selection.keys == fresh.selection.keys
        assert again.train.targets.tolist() == fresh.train.targets.tolist()


@pytest.fixture(params=COMMANDS)
def method(request, png_digits, tiny_model, tmp_path, monkeypatch):
    """The command's name, and a function that runs it on digits."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {holdout: 0.25, workers: 0}\ncompute: {precision: fp32}\n")
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}"]

    def run(*overrides: str) -> int:
        return COMMANDS[request.param]([str(recipe), *tiny_model.overrides, *data, "run.dir=run", *overrides])

    run.name = request.param
    return run


def read_result() -> dict:
    return json.loads(Path("run/result.json").read_text(encoding="utf-8"))


def test_a_run_chooses_on_the_holdout_and_is_reported(method, capsys):
    assert method() == 0
    out = capsys.readouterr().out
    result = read_result()
    (score,) = result["scores"]
    lines = Path("run/candidates.csv").read_text(encoding="utf-8").splitlines()
    rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    best = max(rows, key=lambda row: row["acc1"])
    name = next(iter(best))
    assert score["setting"] == f"{name} = {best[name]:.6g}"
    assert (score["name"], score["chosen_by"], score["split"]) == ("selected", "holdout", "test")
    predicted = list(csv.DictReader(Path("run/predictions.csv").read_text(encoding="utf-8").splitlines()))
    assert score["top1"] == pytest.approx(100 * np.mean([row["target"] == row["predicted"] for row in predicted]))
    assert method.name == "knn" or score["top1"] > 40, "chance is 25"
    low, high = result["interval"]
    assert low <= score["top1"] <= high
    assert f"interval  {low:.2f} to {high:.2f}" in out
    assert "Settings chosen on the hold-out split" in Path("run/report.html").read_text(encoding="utf-8")
    if method.name != "knn":
        from safetensors.torch import load_file

        state = load_file("run/head.safetensors")
        assert LinearScorer(state["0.weight"], state["0.bias"])(torch.zeros(1, 32)).shape == (1, 4)


def test_all_right_of_few_leaves_an_interval(png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    """The nearest of an image among themselves is the image."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: {workers: 0}\nknn: {fixed: 1}\ncompute: {precision: fp32}\n")
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.train}", "run.dir=run"]
    assert probes.knn.main(["recipe.yaml", *tiny_model.overrides, *data]) == 0
    result = read_result()
    assert result["scores"][0]["top1"] == 100
    expected = stats.binomtest(48, 48).proportion_ci(method="wilson")
    assert result["interval"] == pytest.approx([100 * expected.low, 100])
    assert "interval  92.59 to 100.00 (95 %, Wilson)" in capsys.readouterr().out
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "48 of 48 right; the 95 % interval for images of this kind (Wilson) is 92.6 % to 100.0 %." in report


def test_seeds_and_shots_are_repetitions_of_one_extraction(method, capsys):
    assert method("run.seeds=[0,1,2]", "few_shot.shots=[1,4]") == 0
    out = capsys.readouterr().out
    repeats = read_result()["repeats"]
    assert [(row["shots"], row["seed"]) for row in repeats] == [(4, 0), (4, 1), (4, 2), (1, 0), (1, 1), (1, 2)]
    of_four = [row["top1"] for row in repeats[:3]]
    mean, half = mean_interval(of_four)
    assert f"4 shots: top-1 {mean:.2f} ± {half:.2f}" in out
    assert read_result()["scores"][0]["top1"] == of_four[0]
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert f"4 shots: top-1 {mean:.2f} ± {half:.2f}" in report
    assert "All 6 repetitions" in report
    assert method("run.seeds=[0,1]", "run.on_existing=overwrite") == 0
    assert capsys.readouterr().out.count("from the cache") == 2, "train and test; nothing is extracted again"


def test_without_a_holdout_the_recipe_fixes_the_setting(method):
    assert method("data.holdout=0.0") == 0
    result = read_result()
    assert (result["scores"][0]["name"], result["scores"][0]["chosen_by"]) == ("last", "schedule")
    assert any("Nothing was held out to choose" in note for note in result["notes"])


def test_plan_names_the_repetitions(method, capsys):
    assert method("--plan", "few_shot.shots=[2]") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["repetitions"] == [{"shots": 2, "seed": 0}]
    assert (plan["train_size"], plan["num_classes"], plan["feature_dim"]) == (36, 4, 32)


def test_mistakes_end_before_a_run_folder_is_made(method, capsys, tmp_path):
    for override, message in (
        ("model.weights=absent.pt", "no file at absent.pt"),
        ("few_shot.shots=[0]", "expected whole numbers from 1 on"),
        ("features.mode=cached", "unknown key features.mode"),
    ):
        assert method(override) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_runs_of_other_seeds_share_a_holdout_and_repetitions_draw_their_own(method, capsys):
    """What the default holds out is what `run.seed=0` always held out."""

    def held(folder: str) -> str:
        return json.loads(Path(folder, "data.json").read_text(encoding="utf-8"))["splits"]["holdout"]["fingerprint"]

    for seed in (0, 5):
        assert method(f"run.seed={seed}", f"run.dir=seed{seed}") == 0
    assert method("run.seeds=[5,6]", "run.dir=repeated") == 0
    assert method("data.holdout_seed=5", "run.dir=drawn") == 0
    assert held("seed0") == held("seed5") != held("drawn")
    assert held("repeated") == held("drawn"), "the reported repetition is of seed 5"
    data = load_recipe("seed0/recipe.yaml", schema=MethodRecipe, other_sections=True).data
    whole = prepare_splits(dataclasses.replace(data, holdout=0.0)).train
    kept = whole.take("holdout", choose_holdout(whole.targets, whole.keys, data.holdout, 0))
    assert held("seed0") == kept.fingerprint()
    assert method("run.seeds=[5,6]", "data.holdout_seed=3", "run.dir=both") == 2
    assert "data.holdout_seed is 3 with run.seeds" in capsys.readouterr().err
