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
