"""Scores that are not finite are no predictions: one refusal for everything that ranks or classifies.

NaN compares as smaller than anything, so that a broken row would be the first class, or the first rank, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probes.splits import Split

REMEDY = "score in fp32 (compute.precision=fp32 or trainer.precision=fp32); where training diverged, lower optimizer.lr"


def check_finite(rows: torch.Tensor, what: str, name: Callable[[int], str] = "number {}".format) -> None:
    """Refuse rows that hold NaN or infinity.

    Args:
        rows: [N, C], floating point.
        what: they are, such as "scores of test".
        name: of the row at a position.

    Raises:
        ValueError: some do; how many, the first one's name, and the remedy are said.
    """
    if rows.numel() == 0:
        return
    low, high = rows.aminmax(dim=1)  # NaN passes through; an elementwise check would hold a mask of all elements
    broken = ~(low.isfinite() & high.isfinite())
    count = int(broken.sum())
    if count:
        first = name(int(broken.nonzero()[0, 0]))
        raise ValueError(f"{count} of {len(rows)} {what} are not finite, the first of {first}; {REMEDY}")


def check_scores(scores: torch.Tensor, index: torch.Tensor, split: Split) -> None:
    """Refuse scores [N, C] of the samples at positions `index` [N] of a split that are no predictions.

    Raises:
        ValueError: see `check_finite`.
    """
    check_finite(scores, f"rows of scores of {split.name}", lambda row: split.keys[int(index[row])])


def best_row(rows: Sequence[dict[str, float]], column: str) -> dict[str, float]:
    """The first of the rows with the highest value; NaN, of an epoch that diverged, is lower than any."""
    return max(rows, key=lambda row: -math.inf if math.isnan(row[column]) else row[column])
