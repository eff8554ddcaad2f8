"""Intervals of what was measured. No torch.

A proportion of the scored samples has Wilson's interval, what is no proportion (mean average precision) a bootstrap
over the samples, and a mean over repetitions Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def wilson_interval(correct: float, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, `correct` out of `total`, in percent; NaN when `total` is 0.

    Unlike resampling it has a width at the ends: of 20 right out of 20 it is 83.9 to 100. With `level` 0.95 its true
    coverage is near that whatever the proportion (Brown, Cai and DasGupta, 2001).
    """
    if total == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 100 / (1 + z * z / total)
    low, high = (centre - spread) * scale, (centre + spread) * scale
    return 0.0 if correct == 0 else max(0.0, low), 100.0 if correct == total else min(100.0, high)


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
