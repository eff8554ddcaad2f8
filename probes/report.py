"""The report of a run: one HTML file that needs no network, no server and no JavaScript. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from probes.confusion import (
    class_accuracies,
    confused_pairs,
    confusion_counts,
    drawn_matrix,
)
from probes.figures import LogRows, draw_curves, draw_thumbnail
from probes.intervals import summarise_repeats, wilson_interval
from probes.report_text import (
    describe_run,
    describe_score,
    describe_selection,
    find_warnings,
    format_number,
    format_percent,
    format_points,
    is_oracle,
    shorten,
    split_name,
)

if TYPE_CHECKING:
    from PIL import Image

    from probes.results import Baseline, Predictions, RunResult

MISTAKES_SHOWN = 24


@dataclass(frozen=True)
class Bar:
    """One bar beside the reported score."""

    name: str
    top1: float
    note: str
    kind: str
    """"reported", "baseline" or "floor" (what no model is needed for)."""


@dataclass(frozen=True)
class Mistake:
    """One wrongly classified image."""

    key: str
    target: str
    predicted: str
    confidence: float
    target_probability: float
    picture: str
    """Data URL, empty when the picture could not be read."""
    crisp: bool


def write_report(
    path: Path,
    *,
    result: RunResult,
    log: LogRows,
    predictions: Predictions,
    read_image: Callable[[int], Image.Image],
    recipe_yaml: str,
    environment: Mapping[str, str],
    reference_log: LogRows | None = None,
) -> None:
    """Write the report of a finished run as one self-contained HTML file.

    `log` holds the rows of log.txt: `train_class_acc` in [0, 1], `*_acc1` in percent; any may be absent.
    `read_image(i)` returns the picture of prediction i. `reference_log` holds the rows of a published run.
    """
    counts = confusion_counts(predictions, len(result.classes))
    samples, correct = int(counts.sum()), int(counts.trace())
    curves = draw_curves(log, reference_log, result.reported)
    context = {
        "result": result,
        "samples": samples,
        "correct": correct,
        "interval": wilson_interval(correct, samples),
        "sentence": describe_run(result),
        "repeats": summarise_repeats(result.repeats),
        "selection": describe_selection(result, has_epochs=bool(log)),
        "warnings": find_warnings(result, log, predictions, has_reference=reference_log is not None),
        "bars": build_bars(result, predictions),
        "curves": curves,
        "drawn_lines": {name for curve in curves for name in curve.lines},
        "log": log,
        "log_columns": list(dict.fromkeys(key for row in log for key in row)),
        "matrix": drawn_matrix(counts, result.classes),
        "pairs": confused_pairs(counts, result.classes),
        "class_rows": class_accuracies(counts, result.classes),
        "mistakes": gather_mistakes(result.classes, predictions, read_image),
        "recipe_yaml": recipe_yaml,
        "environment": environment,
    }
    path.write_text(build_environment(result.reported.samples).render_page(context), encoding="utf-8")


class ReportEnvironment(jinja2.Environment):
    """Jinja with escaping on, the templates beside this file, and no tolerance for a misspelt name."""

    def __init__(self, digits: int) -> None:
        super().__init__(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.filters |= {
            "percent": lambda value: format_percent(value, digits),
            "points": lambda value: format_points(value, digits),
            "number": format_number,
            "short": shorten,
            "split_name": split_name,
            "describe_score": describe_score,
        }
        self.tests["oracle"] = is_oracle

    def render_page(self, context: Mapping[str, Any]) -> str:
        """The whole page."""
        return self.get_template("report.html.j2").render(context)


def build_environment(samples: int) -> ReportEnvironment:
    """Templates whose percentages show two decimals only where that many samples carry them."""
    return ReportEnvironment(digits=2 if samples >= 2000 else 1)


def majority_class(result: RunResult, predictions: Predictions) -> tuple[str, float]:
    """The most frequent true class and its share in percent."""
    support = np.bincount(predictions.targets, minlength=len(result.classes))
    index = int(support.argmax())
    return result.classes[index], 100 * float(support[index]) / max(1, int(support.sum()))


def build_bars(result: RunResult, predictions: Predictions) -> list[Bar]:
    """The reported score, then what it must be judged by, highest first."""
    reported, chance = result.reported, 100 / len(result.classes)
    name, share = majority_class(result, predictions)
    bars = [Bar(item.name, item.top1, item.note, "baseline") for item in sorted_baselines(result.baselines)]
    always = f"Always answering “{shorten(name, 60)}”, the most frequent class here."
    bars.append(Bar("Majority class", share, always, "floor"))
    guess = f"Guessing blindly among {len(result.classes)} classes: 1/{len(result.classes)}."
    bars.append(Bar("Chance", chance, guess, "floor"))
    return [Bar("This run", reported.top1, f"The reported score ({reported.name}).", "reported"), *bars]


def sorted_baselines(baselines: Sequence[Baseline]) -> list[Baseline]:
    """Highest first, those without a number last."""
    return sorted(baselines, key=lambda item: -math.inf if math.isnan(item.top1) else item.top1, reverse=True)


def gather_mistakes(
    classes: Sequence[str], predictions: Predictions, read_image: Callable[[int], Image.Image]
) -> list[Mistake]:
    """The wrong predictions that the model was surest of, with their pictures."""
    wrong = np.flatnonzero(predictions.targets != predictions.predicted)
    surest_first = wrong[np.argsort(-np.nan_to_num(predictions.confidence[wrong]), kind="stable")]
    mistakes = []
    for index in map(int, surest_first[:MISTAKES_SHOWN]):
        try:
            picture, crisp = draw_thumbnail(read_image(index))
        except Exception:  # any decoder's error: a finished run must not lose its report over one picture
            picture, crisp = "", False
        mistakes.append(
            Mistake(
                key=predictions.keys[index],
                target=classes[int(predictions.targets[index])],
                predicted=classes[int(predictions.predicted[index])],
                confidence=100 * float(predictions.confidence[index]),
                target_probability=100 * float(predictions.target_probability[index]),
                picture=picture,
                crisp=crisp,
            )
        )
    return mistakes
