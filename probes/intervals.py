"""Intervals of what was measured: bootstrap over the scored samples, Student's t over repetitions. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def bootstrap_interval(values: NDArray[np.floating] | NDArray[np.bool_], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N], from 10,000 resamples with a fixed seed.

    Of right and wrong answers the resampled mean is binomial, so that its quantiles are exact and nothing is drawn.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("there are no values to take an interval of")
    from scipy import stats

    tails = [(1 - level) / 2, (1 + level) / 2]
    if values.dtype == np.bool_:
        low, high = stats.binom.ppf(tails, len(values), values.mean()) / len(values)
        return float(low), float(high)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=level, method="percentile", rng=0, batch=100
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of repetitions, and half the width of Student's t interval of it; NaN with fewer than two."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy import stats

    deviation = float(np.std(values, ddof=1))
    return mean, float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))


def summarise_repeats(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean over seeds with its 95 % interval, one line for every number of shots."""
    lines = []
    for shots in dict.fromkeys(row.get("shots") for row in rows):
        values = [row["top1"] for row in rows if row.get("shots") == shots]
        mean, half = mean_interval(values)
        spread = "" if math.isnan(half) else f" ± {half:.2f} (95 % interval of the mean, t)"
        low, high = min(values), max(values)
        of = "" if shots is None else f"{shots:3d} shots: "
        lines.append(f"{of}top-1 {mean:.2f}{spread} over {len(values)} seed(s), {low:.2f} to {high:.2f}")
    return lines


def precision_interval(
    scores: NDArray[np.float32], shown: NDArray[np.bool_], level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean average precision over images, in percent, with a fixed seed.

    Every resample is a count of each image, drawn once for all classes; a class that a resample has no image of has no
    part in its mean. Each class is sorted once, and the precision at every distinct score comes from cumulative counts.

    Args:
        scores: [N, C], higher for more likely.
        shown: [N, C], which classes each image shows.
        level: share of the resamples within.
        resamples: how many; fewer, but 200 at least, where N x C is over two million.
    """
    samples, classes = shown.shape
    resamples = max(min(200, resamples), min(resamples, 2_000_000_000 // (samples * classes)))
    generator, means = np.random.default_rng(0), []
    for first in range(0, resamples, 50):
        counts = generator.multinomial(samples, np.full(samples, 1 / samples), size=min(50, resamples - first))
        found = [_weighted_precision(scores[:, c], shown[:, c], counts) for c in range(classes) if shown[:, c].any()]
        means.append(np.nanmean(np.stack(found), axis=0))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return 100 * float(low), 100 * float(high)


def _weighted_precision(
    scores: NDArray[np.float32], shown: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Average precision [B] of one class, scores and `shown` [N], where image i occurs counts[b, i] times."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of equal scores the last
    weighted = counts[:, order]
    above = np.cumsum(weighted, axis=1)[:, ends]
    right = np.cumsum(weighted * shown[order], axis=1)[:, ends]
    gained = np.diff(right, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):
        precision: NDArray[np.float64] = (gained * right / np.maximum(above, 1)).sum(axis=1) / right[:, -1]
    return precision
