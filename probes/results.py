"""What a finished run says: scores, baselines, expectations and per-sample predictions. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from probes.sections import ExpectedSection


@dataclass(frozen=True)
class Score:
    """Accuracy of one set of head weights on one split."""

    name: str
    """"selected", "last" or "best" (highest on the reported split itself: an oracle, not a result)."""
    split: str
    """The split that was scored."""
    chosen_by: str
    """What chose the weights: "holdout", "val", "schedule" (last epoch), "nothing" (untrained) or the scored split."""
    epoch: int
    """0-based epoch of the weights."""
    top1: float
    """Top-1 accuracy in percent."""
    top5: float
    """Top-5 accuracy in percent; top-k with k = number of classes when there are fewer than five."""
    loss: float
    """Mean cross-entropy over the samples."""
    samples: int
    """Number of samples scored, each counted once."""
    setting: str = ""
    """What was chosen, such as "C = 0.316", by methods that have no epochs."""


@dataclass(frozen=True)
class Baseline:
    """What the same data give without the encoder's knowledge."""

    name: str
    top1: float
    """Top-1 accuracy in percent, on the split and samples of the reported score."""
    note: str
    """How it was obtained, in a sentence or two."""
    spread: tuple[float, float] | None = None
    """Lowest and highest top-1 with settings close to the chosen one, in percent."""


@dataclass(frozen=True)
class Expectation:
    """One figure of the recipe's `expected:` beside what was measured (percent)."""

    name: str
    expected: float
    measured: float | None
    tolerance: float

    @property
    def verdict(self) -> str:
        """ "reached", "above", "below" or "not measured"."""
        if self.measured is None or math.isnan(self.measured):
            return "not measured"
        difference = self.measured - self.expected
        if abs(difference) <= self.tolerance:
            return "reached"
        return "above" if difference > 0 else "below"


@dataclass(frozen=True)
class Predictions:
    """Per-sample outcome of the reported score; all arrays have length N and one order."""

    keys: list[str]
    """Name of each sample in its source."""
    targets: NDArray[np.int64]
    """True class index."""
    predicted: NDArray[np.int64]
    """Predicted class index."""
    confidence: NDArray[np.float32]
    """Softmax probability of the predicted class, in [0, 1]."""
    target_probability: NDArray[np.float32]
    """Softmax probability of the true class, in [0, 1]."""


@dataclass(frozen=True)
class RunResult:
    """The end of one run, as `result.json` holds it."""

    title: str
    """Name of the recipe."""
    method: str
    """The command, such as "probes.linear"."""
    classes: list[str]
    """Class names; index i of every prediction is classes[i]."""
    split_sizes: dict[str, int]
    """Number of samples of each split used, in the order train, holdout or val, test."""
    scores: list[Score]
    """The reported score first."""
    measured: dict[str, float] = field(default_factory=dict)
    """Further metrics by name, in percent."""
    interval: tuple[float, float] | None = None
    """95 % Wilson interval of the reported top-1, a proportion of the scored samples, in percent."""
    repeats: list[dict[str, Any]] = field(default_factory=list)
    """One row a further repetition: `seed`, `top1` in percent, and what the method adds (`shots`, what was chosen)."""
    baselines: list[Baseline] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences a reader must know: skipped images, no test split, size differs from the recipe's."""
    facts: dict[str, str] = field(default_factory=dict)
    """Further label -> value lines: model, weights, feature, trainable parameters, duration."""

    @property
    def reported(self) -> Score:
        """The score that the run stands for."""
        return self.scores[0]

    def to_json(self) -> dict[str, Any]:
        """Plain containers, verdicts included."""
        content = dataclasses.asdict(self)
        for item, expectation in zip(content["expectations"], self.expectations, strict=True):
            item["verdict"] = expectation.verdict
        return content


def compare_expected(expected: ExpectedSection, scores: Sequence[Score]) -> list[Expectation]:
    """Every figure that a recipe expects, beside the score of that name."""
    measured = {score.name: score.top1 for score in scores}
    wanted = {
        "last": expected.last_top1,
        "best": expected.best_top1,
        "selected": expected.selected_top1,
    }
    return [
        Expectation(f"{name} top-1", value, measured.get(name), expected.tolerance)
        for name, value in wanted.items()
        if value is not None
    ]


def candidates_csv(rows: Sequence[dict[str, float]]) -> str:
    """Settings that were tried with their scores, as CSV; empty when nothing was chosen."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()
