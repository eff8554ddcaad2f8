"""A path of 45 C by `probes.softmax_path` against 45 fits of scikit-learn, from one run on scikit-learn's digits.

    python -m benchmarks.logistic

scikit-learn runs at its defaults but for max_iter=1000, once from zeros for every C and once with warm_start. Rounds
take turns; a ratio is of two times of one round. The excess is of our objective over the lower of its two, by C, in
float64.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from probes.method_sections import LogisticSection
from probes.softmax_path import fit_path

ROUNDS = 3
CS = LogisticSection().path

Solution = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weights [C, D] and biases [C]."""


def by_us(features: torch.Tensor, targets: torch.Tensor) -> list[Solution]:
    """The path as `probes.logistic` asks for it."""
    points = fit_path(features, targets, int(targets.max()) + 1, CS, tolerance=LogisticSection().tolerance)
    return [(point.weight.double().numpy(), point.bias.double().numpy()) for point in points]


def by_scikit_learn(features: torch.Tensor, targets: torch.Tensor, warm_start: bool) -> list[Solution]:
    """Fit after fit."""
    model, solutions = LogisticRegression(max_iter=1000, warm_start=warm_start), []
    for c in CS:
        model.set_params(C=c).fit(features.numpy(), targets.numpy())
        solutions.append((model.coef_.astype(np.float64), model.intercept_.astype(np.float64)))
    return solutions


def objectives(features: torch.Tensor, targets: torch.Tensor, solutions: list[Solution]) -> NDArray[np.float64]:
    """C * summed cross-entropy + |W|^2 / 2 of every solution."""
    values, x = [], features.double()
    for c, (weight, bias) in zip(CS, solutions, strict=True):
        losses = torch.nn.functional.cross_entropy(x @ torch.from_numpy(weight).T + torch.from_numpy(bias), targets)
        values.append(c * len(x) * float(losses) + float(np.square(weight).sum()) / 2)
    return np.array(values)


def main() -> None:
    """Print a Markdown table."""
    warnings.simplefilter("ignore")  # scikit-learn's ConvergenceWarning where 1000 steps are not enough
    digits = load_digits()
    data = {
        "digits": (torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target).long()),
    }
    print("| features | ours, median s | over 45 fits (min-max) | over warm starts (min-max) | highest excess |")
    print("|---|---|---|---|---|")
    for name, (features, targets) in data.items():
        ways: dict[str, Callable[[], list[Solution]]] = {
            "ours": lambda x=features, y=targets: by_us(x, y),  # type: ignore[misc]
            "cold": lambda x=features, y=targets: by_scikit_learn(x, y, False),  # type: ignore[misc]
            "warm": lambda x=features, y=targets: by_scikit_learn(x, y, True),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        found = {}
        for _ in range(ROUNDS):
            for way, solve in ways.items():
                start = time.perf_counter()
                solutions = solve()
                times[way].append(time.perf_counter() - start)
                found[way] = objectives(features, targets, solutions)
        excess = float((found["ours"] / np.minimum(found["cold"], found["warm"]) - 1).max())
        cells = []
        for way in ("cold", "warm"):
            ratios = [theirs / mine for theirs, mine in zip(times[way], times["ours"], strict=True)]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})")
        rows, width = features.shape
        shape = f"{name}: {rows:,} x {width}, {int(targets.max()) + 1} classes"
        print(f"| {shape} | {statistics.median(times['ours']):.2f} | {' | '.join(cells)} | {excess:.1e} |", flush=True)


if __name__ == "__main__":
    main()
