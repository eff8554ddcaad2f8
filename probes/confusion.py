"""Which classes are right and which are taken for which: counts, pairs, per-class accuracy. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.intervals import wilson_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from probes.results import Predictions

FULL_MATRIX_CLASSES = 40
"""A full matrix is drawn up to this many classes; beyond, cells become too small to read."""
PARTIAL_MATRIX_CLASSES = 20
"""Classes of the matrix that is drawn instead."""


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that were given another."""

    target: str
    predicted: str
    count: int
    share: float
    """Share of the true class's images in percent."""


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class with its 95 % Wilson interval, all in percent; NaN without images."""

    name: str
    correct: int
    support: int
    accuracy: float
    low: float
    high: float
    confused_with: str
    """Most frequent wrong prediction, empty when there is none."""


@dataclass(frozen=True)
class Cell:
    """One cell of the drawn matrix."""

    count: int
    share: float
    """Share of the row in [0, 1]."""
    right: bool
    predicted: str


@dataclass(frozen=True)
class Matrix:
    """The part of the confusion matrix that is drawn: one row per true class."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    complete: bool
    """False when only the most confused classes are drawn; the last column then gathers all others."""


def mean_recall(predictions: Predictions) -> float:
    """Mean over the classes that occur of the share of their images that were recognised (balanced accuracy), in
    percent.
    """
    counts = np.bincount(predictions.targets)
    right = np.bincount(predictions.targets[predictions.targets == predictions.predicted], minlength=len(counts))
    return 100 * float((right[counts > 0] / counts[counts > 0]).mean())


def confusion_counts(predictions: Predictions, num_classes: int) -> NDArray[np.int64]:
    """Counts [num_classes, num_classes]; row is the true class, column the predicted one."""
    used = np.concatenate([predictions.targets, predictions.predicted])
    assert not len(used) or 0 <= used.min() <= used.max() < num_classes, "class index out of range"
    flat = predictions.targets.astype(np.int64) * num_classes + predictions.predicted
    counts = np.bincount(flat, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def rank_pairs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """All (true, predicted) pairs of mistakes [P, 2], most frequent first, then by share of the row."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    targets, predicted = np.nonzero(wrong)
    amount = wrong[targets, predicted]
    share = amount / counts.sum(axis=1)[targets]
    order = np.lexsort((predicted, targets, -share, -amount))
    return np.stack([targets[order], predicted[order]], axis=1)


def confused_pairs(counts: NDArray[np.int64], classes: Sequence[str], limit: int = 25) -> list[ConfusedPair]:
    """The most frequent pairs, named."""
    pairs = []
    for target, predicted in rank_pairs(counts)[:limit].tolist():
        count = int(counts[target, predicted])
        share = 100 * count / int(counts[target].sum())
        pairs.append(ConfusedPair(classes[target], classes[predicted], count, share))
    return pairs


def class_accuracies(counts: NDArray[np.int64], classes: Sequence[str]) -> list[ClassAccuracy]:
    """Every class, worst first; among equals the better supported first; classes without images last."""
    rows = []
    for index, name in enumerate(classes):
        support, correct = int(counts[index].sum()), int(counts[index, index])
        wrong = counts[index].copy()
        wrong[index] = 0
        confused_with = classes[int(wrong.argmax())] if wrong.any() else ""
        accuracy = 100 * correct / support if support else math.nan
        low, high = wilson_interval(correct, support)
        rows.append(ClassAccuracy(name, correct, support, accuracy, low, high, confused_with))
    return sorted(rows, key=lambda row: (row.support == 0, row.correct / max(1, row.support), -row.support))


def drawn_matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> Matrix:
    """All classes while they fit; otherwise those of the most confused pairs, and a column for the rest."""
    complete = len(classes) <= FULL_MATRIX_CLASSES
    shown = list(range(len(classes)))
    if not complete:
        # Classes of pairs first, so that the mistakes themselves are in the picture, not only their rows.
        ranked = dict.fromkeys([*rank_pairs(counts).ravel().tolist(), *shown])
        shown = sorted(list(ranked)[:PARTIAL_MATRIX_CLASSES])
    columns = [classes[i] for i in shown]
    rows = []
    for i in shown:
        support = max(1, int(counts[i].sum()))
        cells = [Cell(int(counts[i, j]), float(counts[i, j]) / support, i == j, classes[j]) for j in shown]
        if not complete:
            rest = int(counts[i].sum() - counts[i, shown].sum())
            cells.append(Cell(rest, rest / support, False, "all other classes"))
        rows.append((classes[i], cells))
    return Matrix(columns if complete else [*columns, "all other classes"], rows, complete)
