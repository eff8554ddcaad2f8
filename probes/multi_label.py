"""Images that show any number of classes: average precision of each class, and the tables of a run that measures it."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PrecisionScore:
    """Mean average precision of one set of weights on one split."""

    name: str
    """As of `probes.results.Score`."""
    split: str
    """The split that was scored."""
    chosen_by: str
    """As of `probes.results.Score`."""
    epoch: int
    """0-based epoch of the weights."""
    mean_average_precision: float
    """Percent, over the classes that occur."""
    loss: float | None
    """Mean binary cross-entropy over images and classes; None where the scores are no log-odds."""
    samples: int
    """Number of images scored, each counted once."""
    setting: str = ""
    """What was chosen, such as "C = 0.316", by methods that have no epochs."""


@dataclass(frozen=True)
class LabelScores:
    """Scores of every class for every readable image of a split."""

    keys: list[str]
    """Name of each image, N of them."""
    values: NDArray[np.float32]
    """[N, C], higher for more likely."""
    shown: NDArray[np.bool_]
    """[N, C], which classes each image shows."""
    log_odds: bool
    """Whether the sigmoid of a value is a probability."""

    @functools.cached_property
    def precisions(self) -> NDArray[np.float64]:
        """Average precision of each class in percent, [C]; NaN of a class without an image."""
        return average_precisions(self.values, self.shown)

    @property
    def mean(self) -> float:
        """Mean average precision in percent, over the classes that occur."""
        return float(np.nanmean(self.precisions))


def average_precisions(scores: NDArray[np.float32], shown: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision (the area under the steps, without interpolation) of each class in percent; no image, NaN.

    From the raw scores: a sigmoid on logits of this size would make many of them equal in float32.

    Args:
        scores: [N, C], higher for more likely.
        shown: [N, C], which classes each image shows.

    Returns:
        [C].
    """
    from sklearn.metrics import average_precision_score

    precisions = np.full(shown.shape[1], np.nan)
    for target in np.flatnonzero(shown.any(axis=0)):
        precisions[target] = 100 * average_precision_score(shown[:, target], scores[:, target])
    return precisions


def precision_table(classes: Sequence[str], shown: NDArray[np.bool_], precisions: NDArray[np.float64]) -> str:
    """One line a class: name, images that show it, average precision in percent (empty where none does)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["class", "images", "average_precision"])
    for name, count, value in zip(classes, shown.sum(axis=0), precisions, strict=True):
        writer.writerow([name, int(count), "" if np.isnan(value) else f"{value:.4f}"])
    return stream.getvalue()


def prediction_table(classes: Sequence[str], scores: LabelScores) -> str:
    """One line an image: key, labels, and of log-odds those over one half and every probability, else every score."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    what, columns = ("probability", ["predicted"]) if scores.log_odds else ("score", [])
    writer.writerow(["key", "labels", *columns, *(f"{what} of {name}" for name in classes)])

    def join(mask: NDArray[np.bool_]) -> str:
        return "|".join(name for name, chosen in zip(classes, mask, strict=True) if chosen)

    for key, labels, row in zip(scores.keys, scores.shown, scores.values.astype(np.float64), strict=True):
        over_half = [join(row > 0)] if scores.log_odds else []
        values = np.exp(-np.logaddexp(0, -row)) if scores.log_odds else row
        writer.writerow([key, join(labels), *over_half, *(f"{value:.6f}" for value in values)])
    return stream.getvalue()
