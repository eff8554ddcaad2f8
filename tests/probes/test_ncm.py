"""Nearest class mean and linear discriminant analysis against scikit-learn, and the command that chooses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestCentroid

import probes.compare
import probes.knn
import probes.ncm
from probes.feature_run import Samples
from probes.ncm import ClassMeans, NcmSection


def digits() -> tuple[Samples, torch.Tensor]:
    """1,000 digits to train, the other 797 to score; some pixels are always 0."""
    data = load_digits()
    features, targets = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()
    return Samples("train", features[:1000], targets[:1000], 10), features[1000:]


def random() -> tuple[Samples, torch.Tensor]:
    """Four classes of 30 to 150 samples in 20 correlated dimensions, off the origin."""
    generator = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2, 3], [30, 150, 70, 50])
    mixed, means = np.eye(20) + generator.normal(size=(20, 20)) / 10, generator.normal(size=(4, 20)) / 2
    features = torch.from_numpy(2 + generator.normal(size=(300, 20)) @ mixed + means[targets]).float()
    queries = torch.from_numpy(2 + generator.normal(size=(100, 20)) @ mixed).float()
    return Samples("train", features, torch.from_numpy(targets), 4), queries


DATA = {"digits": digits, "random": random}


def less_row_mean(scores: np.ndarray) -> np.ndarray:
    """What is left of scores when a constant a row does not count."""
    return scores - scores.mean(axis=1, keepdims=True)


def discriminant(train: Samples, shrinkage: float, priors: str = "auto") -> LinearDiscriminantAnalysis:
    uniform = np.full(train.num_classes, 1 / train.num_classes) if priors == "uniform" else None
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=uniform)
    return model.fit(train.features.double().numpy(), train.targets.numpy())


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("priors", ["auto", "uniform"])
@pytest.mark.parametrize("shrinkage", [1.0, 0.5, 0.1, 0.01])
def test_a_shared_covariance_is_scikit_learns_discriminant(data, priors, shrinkage, monkeypatch):
    train, queries = DATA[data]()
    monkeypatch.setattr(probes.ncm, "BLOCK_ROWS", 128)
    scorer, rows = ClassMeans(NcmSection(priors=priors)).fit(train, shrinkage), queries.double().numpy()
    reference = discriminant(train, shrinkage, priors)
    scores = rows @ scorer.weight.double().numpy().T + scorer.bias.double().numpy()
    wanted = reference.decision_function(rows)
    np.testing.assert_allclose(less_row_mean(scores), less_row_mean(wanted), atol=1e-5, rtol=1e-5)
    probabilities = scorer(queries).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("data", DATA)
def test_no_covariance_is_scikit_learns_nearest_centroid(data):
    train, queries = DATA[data]()
    method = ClassMeans(NcmSection(covariance="none"))
    ((value, scorer),) = method.path(train)
    assert value == method.fixed == 1.0
    scores, rows = scorer(queries).numpy(), queries.double().numpy()
    reference = NearestCentroid().fit(train.features.double().numpy(), train.targets.numpy())
    wanted = pairwise_distances(rows, reference.centroids_)
    squares = wanted[:, :1] ** 2 - 2 * (scores - scores[:, :1])  # of a score only its lead over another's has a meaning
    np.testing.assert_allclose(np.sqrt(squares), wanted, atol=1e-5, rtol=0)
    assert (scores.argmax(axis=1) == reference.predict(rows)).all()
    shrunk = ClassMeans(NcmSection(priors="uniform")).fit(train, 1.0)(queries)
    assert (shrunk.numpy().argmax(axis=1) == reference.predict(rows)).all()


def test_the_path_is_every_setting_on_its_own_the_most_shrunk_first():
    train, queries = digits()
    method = ClassMeans(NcmSection(shrinkage=[0.01, 1.0, 0.3, 0.3]))
    path = list(method.path(train))
    assert [value for value, _ in path] == [1.0, 0.3, 0.01]
    assert all(torch.equal(scorer(queries), method.fit(train, value)(queries)) for value, scorer in path)


def test_directions_without_variance_take_no_part():
    whole, queries = digits()
    train = Samples("train", whole.features[:30], whole.targets[:30], 10)
    rows, targets = train.features.double().numpy(), train.targets.numpy()
    means = np.stack([rows[targets == number].mean(axis=0) for number in range(10)])
    inverse = np.linalg.pinv((rows - means[targets]).T @ (rows - means[targets]) / 30, rcond=1e-10, hermitian=True)
    apart = queries.double().numpy()[:, None] - means  # [n, C, D]
    wanted = np.log(np.bincount(targets) / 30) - np.einsum("ncd,de,nce->nc", apart, inverse, apart) / 2
    scores = ClassMeans(NcmSection()).fit(train, 0.0)(queries).numpy()
    worst = np.abs(less_row_mean(scores) - less_row_mean(wanted)).max()
    assert worst < 1e-5 * np.abs(wanted).max()


def test_one_image_a_class_is_the_nearest_image():
    whole, queries = digits()
    train = Samples("train", whole.features[:10], whole.targets[:10], 10)
    assert sorted(train.targets.tolist()) == list(range(10))
    distances = torch.from_numpy(pairwise_distances(queries.double(), train.features.double()[train.targets.argsort()]))
    for value in (0.0, 0.1, 1.0):
        chosen = ClassMeans(NcmSection()).fit(train, value)(queries).argmax(dim=1)
        apart = distances.gather(1, chosen[:, None])[:, 0]  # pixels are whole numbers, so that two may be as near
        torch.testing.assert_close(apart, distances.amin(dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"priors": "uniform"}, {"covariance": "none"}], ids=str)
def test_a_class_without_an_image_never_wins(settings):
    whole, queries = digits()
    there = whole.targets != 3
    train = Samples("train", whole.features[there], whole.targets[there], 10)
    far = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 100
    centre = train.features.mean(dim=0, keepdim=True)
    for value, scorer in ClassMeans(NcmSection(**settings)).path(train):
        assert (scorer(torch.cat([queries, far, centre])).argmax(dim=1) != 3).all()
        scores = scorer(queries)
        assert scores.isfinite().all()
        assert scores.softmax(dim=1)[:, 3].max() < 1e-30
        if not settings:
            wanted = discriminant(train, value).predict_proba(queries.double().numpy())
            np.testing.assert_allclose(scores.softmax(dim=1)[:, np.arange(10) != 3].numpy(), wanted, atol=1e-5, rtol=0)


@pytest.fixture
def run(png_digits, tiny_model, tmp_path, monkeypatch):
    """The command on digits, its run in `run`; another method's with `main`."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: {holdout: 0.25, workers: 0}\ncompute: {precision: fp32}\n")
    argv = ["recipe.yaml", *tiny_model.overrides, f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    return lambda *overrides, main=probes.ncm.main: main([*argv, "run.dir=run", *overrides])


def test_the_command_chooses_repeats_reports_and_compares(run, capsys):
    assert run("run.seeds=[0,1]", "few_shot.shots=[1,4]") == 0
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert [(row["shots"], row["seed"]) for row in result["repeats"]] == [(4, 0), (4, 1), (1, 0), (1, 1)]
    assert [row["shrinkage"] for row in result["repeats"][2:]] == [0.1, 0.1], "one image leaves nothing to choose on"
    rows = list(csv.DictReader(Path("run/candidates.csv").read_text(encoding="utf-8").splitlines()))
    best = max(rows, key=lambda row: float(row["acc1"]))
    (score,) = result["scores"]
    assert score["setting"] == f"shrinkage = {float(best['shrinkage']):.6g}"
    assert (score["chosen_by"], score["split"], result["method"]) == ("shots_holdout", "test", "probes.ncm")
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "given the class of the nearest mean in the features of" in report
    assert "All 4 repetitions" in report
    assert Path("run/head.safetensors").is_file()
    assert run("run.dir=knn", main=probes.knn.main) == 0
    capsys.readouterr()
    assert probes.compare.main(["run", "knn"]) == 0
    assert f"| probes.ncm | {score['setting']}, by shots_holdout | {score['top1']:.2f} |" in capsys.readouterr().out


def test_all_of_train_with_and_without_a_covariance(run):
    for covariance in ("shared", "none"):
        assert run(f"ncm.covariance={covariance}", "run.on_existing=overwrite") == 0
        (score,) = json.loads(Path("run/result.json").read_text(encoding="utf-8"))["scores"]
        assert score["top1"] > 40, "chance is 25"
    assert score["setting"] == "shrinkage = 1"


def test_the_plan_lists_what_will_be_tried(run, capsys):
    assert run("--plan", "ncm.shrinkage=[0.1,1.0]") == 0
    assert json.loads(capsys.readouterr().out)["shrinkage"] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ncm.shrinkage=[1.5]", "ncm.shrinkage is [1.5]; expected one or more numbers from 0 to 1"),
        ("ncm.shrinkage=[]", "expected one or more numbers"),
        ("ncm.fixed=2.0", "ncm.fixed is 2.0; expected at most 1.0"),
        ("ncm.priors=even", "expected one of auto, uniform"),
    ],
)
def test_mistakes_end_before_a_run_folder_is_made(run, capsys, override, message):
    assert run(override) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("more", [[], ["--plan"]], ids=["run", "plan"])
def test_several_labels_are_refused_with_a_reason(run, capsys, png_digits, more):
    assert run("data.labels=multi", "data.format=csv", f"data.train={png_digits.csv}", "data.test=null", *more) == 2
    assert "means need one class an image; use single or probes.ridge" in capsys.readouterr().err
    assert not Path("run").exists()
