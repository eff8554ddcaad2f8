"""The path of logistic regressions against scikit-learn's solutions and autograd's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from probes.certificate import certified_excess, settle_biases
from probes.class_weights import balanced_weights
from probes.extraction import load_tables
from probes.method_sections import LogisticRecipe
from probes.newton import Objective, minimise
from probes.recipe import load_recipe
from probes.regression_losses import LOSSES
from probes.softmax_path import ABSENT_BIAS, PathPoint, fit_path
from probes.splits import prepare_splits

CS = [1e-6, 1e-3, 1e-1, 10.0, 1e3, 1e5]


def load(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.from_numpy(data.data[:rows]).float(), torch.from_numpy(data.target[:rows]).long()


def objective(
    features: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, c: float, weights=None
) -> torch.Tensor:
    """scikit-learn's, written from its documentation."""
    losses = F.cross_entropy(features.double() @ weight.T + bias, targets, reduction="none")
    total = losses.sum() if weights is None else (losses * weights).sum()
    return c * total + weight.square().sum() / 2


def own(features: torch.Tensor, targets: torch.Tensor, point: PathPoint, weights=None) -> float:
    return float(objective(features, targets, point.weight.double(), point.bias.double(), point.c, weights))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [300, 40], ids=["more rows than columns", "fewer"])
def test_no_higher_than_scikit_learns_minimum(rows, weighted):
    features, targets = load(rows)
    weights = balanced_weights(targets.bincount(minlength=10))[targets] if weighted else None
    for point in fit_path(features, targets, 10, CS, sample_weights=weights):
        reference = LogisticRegression(C=point.c, tol=1e-8, max_iter=3000)
        reference.fit(features.double().numpy(), targets.numpy(), sample_weight=weights)
        coefficients, intercepts = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
        minimum = float(objective(features, targets, coefficients, intercepts, point.c, weights))
        assert point.converged
        assert own(features, targets, point, weights) <= minimum * (1 + 1e-3)
        assert point.objective == pytest.approx(own(features, targets, point, weights), rel=1e-3)


def test_the_gradient_vanishes_at_the_solution():
    features, targets = load(300)
    (point,) = fit_path(features, targets, 10, [0.1], tolerance=1e-9)
    weight, bias = (t.double().clone().requires_grad_() for t in (point.weight, point.bias))
    objective(features, targets, weight, bias, 0.1).backward()
    assert float(weight.grad.norm()) < 1e-4 * float(weight.detach().norm())
    assert float(bias.grad.norm()) < 1e-4


def test_a_warm_start_changes_the_way_and_not_the_end():
    features, targets = load(300)
    for warm in fit_path(features, targets, 10, CS):
        (cold,) = fit_path(features, targets, 10, [warm.c])
        assert warm.objective == pytest.approx(cold.objective, rel=2e-4)


def test_each_class_against_the_rest_is_a_binary_fit():
    features, targets = load(300)
    shown = torch.stack([targets % 2 == 0, targets > 6, targets == 3], dim=1).float()
    for point in fit_path(features, shown, 3, [1e-4, 1e-2, 1.0], loss="bce"):
        for target in range(3):
            reference = LogisticRegression(C=point.c, tol=1e-8, max_iter=3000).fit(features.numpy(), shown[:, target])
            logits = features.double() @ point.weight[target].double() + point.bias[target].double()
            theirs = features.double().numpy() @ reference.coef_[0] + reference.intercept_[0]
            assert np.abs(logits.numpy() - theirs).max() < 0.05 * np.abs(theirs).std()


def test_a_class_without_a_sample_is_never_predicted():
    features, targets = load(300)
    targets = torch.where(targets == 4, torch.tensor(5), targets)
    (point,) = fit_path(features, targets, 11, [1.0])
    assert point.bias[4] == point.bias[10] == -ABSENT_BIAS
    assert point.weight[4].abs().max() == 0
    predicted = (features @ point.weight.T + point.bias).argmax(dim=1)
    assert not ((predicted == 4) | (predicted == 10)).any()
    assert float((predicted == targets).float().mean()) > 0.98


def test_one_sample_of_a_class_and_constant_columns_are_no_trouble():
    features, targets = load(100)
    features = torch.cat([features, torch.ones(100, 3)], dim=1)
    kept = (targets != 7) | (torch.arange(100) == int((targets == 7).nonzero()[0]))
    (point,) = fit_path(features[kept], targets[kept], 10, [1e3])
    assert point.converged
    assert bool(((features[kept] @ point.weight.T + point.bias).argmax(dim=1) == targets[kept]).all())


def test_float32_serves_large_problems(monkeypatch):
    features, targets = load(300)
    exact = list(fit_path(features, targets, 10, CS))
    monkeypatch.setattr("probes.softmax_path.FLOAT64_ELEMENTS", 0)
    monkeypatch.setattr("probes.newton.BLOCK_BYTES", 10_000)  # several blocks
    for point, reference in zip(fit_path(features, targets, 10, CS), exact, strict=True):
        assert own(features, targets, point) <= own(features, targets, reference) * (1 + 1e-3)


def test_mistakes_are_named():
    features, targets = load(20)
    features[[3, 7], 0] = float("nan")
    with pytest.raises(ValueError, match=r"2 of 20 feature rows are not finite, at position 3, 7"):
        next(fit_path(features, targets, 10, [1.0]))
    with pytest.raises(ValueError, match=r"C is 0\.0; expected finite numbers above 0"):
        next(fit_path(features, targets, 10, [0.0]))
    with pytest.raises(ValueError, match="no samples"):
        next(fit_path(features[:0], targets[:0], 10, [1.0]))


@pytest.mark.slow
def test_the_quickstarts_features_too(repo, monkeypatch, tmp_path):
    monkeypatch.chdir(repo)  # the recipe's pictures
    recipe = load_recipe(
        repo / "recipes" / "quickstart" / "logistic.yaml",
        ["data.holdout=0.0", f"features.cache={tmp_path}"],
        LogisticRecipe,
    )
    table = load_tables(recipe, prepare_splits(recipe.data))["train"]
    features, targets = table.features.float(), table.targets
    for point in fit_path(features, targets, 30, [1e-4, 1e-2, 1.0, 100.0]):
        reference = LogisticRegression(C=point.c, tol=1e-6, max_iter=3000)
        reference.fit(features.double().numpy(), targets.numpy())
        coefficients, intercepts = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
        minimum = float(objective(features, targets, coefficients, intercepts, point.c))
        assert own(features, targets, point) <= minimum * (1 + 1e-3)


def build_objective(loss: str, weighted: bool) -> tuple[Objective, torch.Tensor, torch.Tensor]:
    """Of 150 digits, some of them standardised, and 4 classes; with targets and sample weights."""
    features, digits = load(150)
    features = (features - features.mean(dim=0)).double()[:, 20:40] / 8
    targets = digits % 4 if loss == "softmax" else torch.stack([digits % 2 == 0, digits > 6, digits == 3], 1).double()
    weights = torch.rand(150, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    columns = torch.cat([features, torch.ones(150, 1, dtype=torch.float64)], dim=1)
    return Objective(columns, targets, weights[:, None] if weighted else None, LOSSES[loss]), targets, weights


def minimum_of(loss: str, weighted: bool, c: float) -> float:
    """scikit-learn's minimum, or the sum of its minima of each class against the rest."""
    objective, targets, weights = build_objective(loss, weighted)
    features, of_sample = objective.columns[:, :-1].numpy(), weights.numpy() if weighted else np.ones(150)
    total = 0.0
    for target in targets.T if loss == "bce" else [targets]:
        model = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(features, target.numpy(), of_sample)
        logits = features @ model.coef_.T + model.intercept_
        if loss == "bce":
            losses = np.logaddexp(0, np.where(target.numpy() > 0, -logits[:, 0], logits[:, 0]))
        else:
            losses = F.cross_entropy(torch.from_numpy(logits), target, reduction="none").numpy()
        total += float(c * (losses * of_sample).sum() + (model.coef_**2).sum() / 2)
    return total


@pytest.mark.parametrize("c", [1e-3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_the_certificate_bounds_the_whole_objective_wherever_the_biases_are(loss, weighted, c):
    objective, _, _ = build_objective(loss, weighted)
    classes, minimum = (4 if loss == "softmax" else 3), minimum_of(loss, weighted, c)
    zero = objective.evaluate(torch.zeros(21, classes, dtype=torch.float64), c)
    best = minimise(objective, zero, c, constant=zero.value, tolerance=1e-11, max_iterations=100)
    assert best.value == pytest.approx(minimum, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-4, 1e-2, 1.0, 8.0):
        for moved in ("biases", "all"):
            noise = size * torch.randn(21, classes, generator=generator, dtype=torch.float64)
            noise[:-1] *= moved == "all"
            point = objective.evaluate(best.weights + noise, c)
            bound = certified_excess(objective, point, objective.gradient(point, c), c)
            assert bound >= (point.value - minimum) * (1 - 1e-9) - 1e-9 * minimum
    if loss == "bce" and c < 1:  # the curvature at the point is not the curvature on the way
        point = objective.evaluate(torch.cat([best.weights[:-1], 0 * best.weights[-1:]]), c)
        gradient, diagonal = objective.gradient(point, c), objective.diagonal(point, c)
        estimate = gradient[:-1].square().sum() / 2 + (gradient[-1].square() / diagonal[-1]).sum() / 2
        assert float(estimate) < point.value - minimum <= certified_excess(objective, point, gradient, c) * (1 + 1e-6)


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_settled_biases_are_the_best_for_their_weights(loss):
    objective, _, _ = build_objective(loss, weighted=True)
    classes = 4 if loss == "softmax" else 3
    noise = torch.randn(21, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = objective.evaluate(noise / 3, 1.0)
    settled = settle_biases(objective, point, 1.0, 1e-8)
    assert torch.equal(settled.weights[:-1], point.weights[:-1])
    assert settled.value < point.value
    assert float(objective.gradient(settled, 1.0)[-1].abs().sum()) <= 1e-6
    assert float(objective.gradient(point, 1.0)[-1].abs().sum()) > 1


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_excess_over_scikit_learns_minimum_is_within_the_tolerance(tolerance, weighted):
    features, targets = load(300)
    features = features / 16
    weights = balanced_weights(targets.bincount(minlength=10))[targets] if weighted else None
    for point in fit_path(features, targets, 10, [1e-2, 1.0, 100.0], sample_weights=weights, tolerance=tolerance):
        reference = LogisticRegression(C=point.c, tol=1e-11, max_iter=20000)
        reference.fit(features.double().numpy(), targets.numpy(), sample_weight=weights)
        coefficients, intercepts = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
        minimum = float(objective(features, targets, coefficients, intercepts, point.c, weights))
        assert point.converged
        assert point.objective - minimum <= tolerance * minimum + 1e-10 * minimum
        if tolerance == 1e-8:
            shift = point.bias.double() - point.bias.double().mean() - intercepts + intercepts.mean()
            assert float(shift.abs().max()) < 2e-3 * float(intercepts.abs().max())
