"""Confusion counts, pairs and per-class accuracy on cases worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.confusion import (
    class_accuracies,
    confused_pairs,
    confusion_counts,
    drawn_matrix,
)
from probes.results import Predictions


def make_predictions(targets: list[int], predicted: list[int]) -> Predictions:
    certain = np.ones(len(targets), dtype=np.float32)
    return Predictions(
        [""] * len(targets),
        np.array(targets),
        np.array(predicted),
        confidence=certain,
        target_probability=certain,
    )


def test_confusion_tables() -> None:
    predictions = make_predictions([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2])
    names = ["a", "b", "c", "unused"]
    counts = confusion_counts(predictions, 4)
    assert [(pair.target, pair.predicted, pair.count) for pair in confused_pairs(counts, names)] == [
        ("a", "b", 2),
        ("b", "a", 1),
    ]
    rows = class_accuracies(counts, names)
    assert [row.name for row in rows] == ["a", "b", "c", "unused"]
    assert math.isnan(rows[-1].accuracy)
    assert rows[0].confused_with == "b"
    assert drawn_matrix(counts, names).complete
    with pytest.raises(AssertionError):
        confusion_counts(predictions, 2)


def test_matrix_of_many_classes_keeps_row_sums() -> None:
    targets, predicted = list(range(50)) * 2, [*range(50), *((index * 7) % 50 for index in range(50))]
    counts = confusion_counts(make_predictions(targets, predicted), 50)
    matrix = drawn_matrix(counts, [str(index) for index in range(50)])
    assert not matrix.complete
    assert all(sum(cell.count for cell in cells) == 2 for _, cells in matrix.rows)
