"""Time of the methods on frozen features against images, width, classes and heads, on log axes with fitted exponents.

    python -m benchmarks.growth [SVG]

One of the four sizes grows at a time, the others stay. An exponent is the slope of a straight line through the
logarithms (least squares over all rounds); the factor beside it is the largest distance of a median from that line.
Features are Gaussian around a centre for each class.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from probes.bank import HeadBank, build_grid
from probes.feature_run import Samples
from probes.knn import Neighbours
from probes.method_sections import KnnSection, RidgeSection
from probes.ridge import Ridge
from probes.softmax_path import fit_path

BASE = {"images": 4000, "width": 128, "classes": 20, "heads": 16}
STEPS = {
    "images": (2000, 4000, 8000, 16000),
    "width": (64, 128, 256, 512),
    "classes": (20, 40, 80, 160),
    "heads": (8, 16, 32, 64),
}
ROUNDS, BATCH, QUERIES = 3, 256, 1000


def draw(images: int, width: int, classes: int) -> Samples:
    """Features [images, width] with every class about as often."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    targets = torch.randint(classes, (images,), generator=generator)
    return Samples("train", centres[targets] + 3 * torch.randn(images, width, generator=generator), targets, classes)


def fit_logistic(train: Samples, heads: int) -> None:
    """One C, from zeros."""
    list(fit_path(train.features, train.targets, train.num_classes, [1.0]))


def fit_ridge(train: Samples, heads: int) -> None:
    """One penalty."""
    Ridge(RidgeSection()).fit(train, 0.1)


def vote(train: Samples, heads: int) -> None:
    """Score queries against all of train."""
    Neighbours(KnnSection()).fit(train, 20.0)(train.features[:QUERIES])


def train_bank(train: Samples, heads: int) -> None:
    """One pass over train."""
    bank = HeadBank(
        build_grid(["features"], [0.01 * 2 ** (-i / 8) for i in range(heads)], (0.0,), "linear"),
        {"features": train.features.shape[1]},
        train.num_classes,
    )
    for features, targets in zip(train.features.split(BATCH), train.targets.split(BATCH), strict=True):
        bank.train_step({"features": features}, targets)


METHODS: dict[str, tuple[Callable[[Samples, int], None], tuple[str, ...]]] = {
    "logistic, one C": (fit_logistic, ("images", "width", "classes")),
    "ridge, one penalty": (fit_ridge, ("images", "width", "classes")),
    f"knn, {QUERIES:,} queries": (vote, ("images", "width", "classes")),
    "bank, one pass": (train_bank, ("images", "width", "classes", "heads")),
}

Curve = tuple[str, tuple[int, ...], list[list[float]], float, float]
"""Method, sizes, seconds of every round by size, intercept and slope of the line."""


def measure(method: Callable[[Samples, int], None], variable: str) -> list[list[float]]:
    """Seconds of every round, by size; sizes take turns after one pass that is thrown away."""
    sizes = [{**BASE, variable: step} for step in STEPS[variable]]
    data = [draw(size["images"], size["width"], size["classes"]) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for number in range(ROUNDS + 1):
        for size, train, column in zip(sizes, data, seconds, strict=True):
            start = time.perf_counter()
            method(train, size["heads"])
            if number:
                column.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print a Markdown table; with an argument, draw the curves too."""
    curves: dict[str, list[Curve]] = {variable: [] for variable in STEPS}
    print("| method | growing | from, median s | to, median s | exponent | largest factor off the line |")
    print("|---|---|---|---|---|---|")
    for name, (method, variables) in METHODS.items():
        for variable in variables:
            steps, seconds = STEPS[variable], measure(method, variable)
            points = [(math.log(x), math.log(y)) for x, column in zip(steps, seconds, strict=True) for y in column]
            slope, intercept = np.polyfit(*zip(*points, strict=True), 1)
            medians = [statistics.median(column) for column in seconds]
            line = [math.exp(intercept + slope * math.log(x)) for x in steps]
            off = max(max(y / fitted, fitted / y) for y, fitted in zip(medians, line, strict=True))
            ends = " | ".join(f"{steps[i]:,}: {medians[i]:.3g}" for i in (0, -1))
            print(f"| {name} | {variable} | {ends} | {slope:.2f} | {off:.2f} |", flush=True)
            curves[variable].append((name, steps, seconds, float(intercept), float(slope)))
    if len(sys.argv) > 1:
        plot(curves, Path(sys.argv[1]))


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """One panel a size: every round as a dot, and the fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axes, (variable, found) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for number, (name, steps, seconds, intercept, slope) in enumerate(found):
            colour = f"C{list(METHODS).index(name)}"
            for x, column in zip(steps, seconds, strict=True):
                axes.plot([x] * len(column), column, ".", color=colour)
            line = [math.exp(intercept + slope * math.log(x)) for x in steps]
            axes.plot(steps, line, color=colour, label=f"{name}: {slope:.2f}", zorder=-number)
        axes.set(xscale="log", yscale="log", xlabel=variable)
        axes.legend(fontsize=7, title="exponent", title_fontsize=7)
    figure.supylabel("seconds")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
