"""The words and numbers of the report: what was done, what a score means, what a reader must know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from probes.figures import LogRows, read_number

if TYPE_CHECKING:
    from probes.results import Predictions, RunResult, Score

METHODS = {
    "linear": "A linear classifier was trained on the features of {encoder}, which itself stayed unchanged",
    "logistic": "Logistic regression was fitted on the features of {encoder}, which itself stayed unchanged",
    "ridge": "Ridge regression was solved on the features of {encoder}, which itself stayed unchanged",
    "ncm": "Every image was given the class of the nearest mean in the features of {encoder}",
    "knn": "Every image was classified by its nearest neighbours in the features of {encoder}",
    "zeroshot": "Every image was compared with the class names by {encoder}, without any training",
    "finetune": "{encoder} and a classifier on top of it were trained together",
}
SPLITS = {"train": "training", "holdout": "hold-out", "val": "validation", "test": "test"}


def format_percent(value: float | None, digits: int) -> str:
    """A percentage, a dash when there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f} %"


def format_points(value: float, digits: int) -> str:
    """A difference of two percentages, always with its sign."""
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def format_number(value: object) -> str:
    """Any value of the log: four significant digits, whole numbers in full."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def shorten(text: str, length: int = 26) -> str:
    """The text, cut in the middle when it is longer than `length`, because ends of names often differ."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def split_name(split: str) -> str:
    """The word for a split in a sentence."""
    return SPLITS.get(split, split)


def is_oracle(score: Score) -> bool:
    """Whether the weights were chosen on the very samples that the score is measured on."""
    return score.name == "best" or score.chosen_by == score.split


def describe_run(result: RunResult) -> str:
    """What was done, in one sentence."""
    facts = {label.lower(): value for label, value in result.facts.items()}
    encoder = facts.get("model") or facts.get("encoder") or "the encoder"
    last = result.method.rsplit(".", 1)[-1]
    template = METHODS.get(last, f"{result.method} was run with {{encoder}}")
    done = template.format(encoder=encoder)
    reported, count = result.reported, len(result.classes)
    sizes = {split: size for split, size in result.split_sizes.items() if size and split != reported.split}
    using = f", using {sizes['train']:,} training images" if "train" in sizes else ""
    if reported.chosen_by in sizes:
        using += f" and {sizes[reported.chosen_by]:,} {split_name(reported.chosen_by)} images to choose with"
    images = "image" if reported.samples == 1 else "images"
    return (
        f"{done}, to tell {count:,} {'class' if count == 1 else 'classes'} apart{using}; it was then scored "
        f"on {reported.samples:,} {split_name(reported.split)} {images}."
    )


def describe_chooser(score: Score) -> str:
    """What chose the weights: a split, or another rule in its own words."""
    return f"on the {SPLITS[score.chosen_by]} split" if score.chosen_by in SPLITS else f"by {score.chosen_by}"


def describe_selection(result: RunResult, *, has_epochs: bool) -> str:
    """Which split chose the reported weights and which one they were scored on."""
    score = result.reported
    reported = f"reported on the {split_name(score.split)} split"
    if is_oracle(score):
        return f"Chosen and {reported}: too favourable, because the same images did both."
    if score.chosen_by == "nothing":
        return f"Nothing was trained and nothing was chosen; {reported}."
    if score.chosen_by == "schedule":
        what = "Weights of the last epoch, as fixed" if has_epochs else "Everything was fixed"
        return f"{what} beforehand (nothing was chosen); {reported}."
    what = f"Weights of epoch {score.epoch}, chosen" if has_epochs else "Settings chosen"
    chosen = f"{what} {describe_chooser(score)}"
    return f"{chosen}; {reported}, which had no part in the choice."


def describe_score(score: Score) -> str:
    """What one score means, in one line."""
    if is_oracle(score) and score.name != "best":
        return "Chosen on the very images it is scored on, so that it flatters; give a test split for an honest one."
    if is_oracle(score):
        over = "heads" if score.setting else "epochs"
        return (
            f"The highest over all {over} on the very images it is scored on. It flatters, so it is no "
            "result; it is here because published runs often quote it."
        )
    if score.chosen_by == "nothing":
        return "The model as it is: nothing was trained."
    if score.chosen_by == "schedule":
        return "The end of training, without choosing anything."
    return f"Chosen {describe_chooser(score)}, then scored on images that had no part in the choice."


def find_warnings(result: RunResult, log: LogRows, predictions: Predictions, *, has_reference: bool) -> list[str]:
    """The run's own notes, then what the numbers themselves give away."""
    reported, found = result.reported, list(result.notes)
    if is_oracle(reported):
        found.append("The reported score was chosen on the data it is scored on; expect less on new images.")
    if any(not math.isfinite(score.loss) for score in result.scores):
        found.append("A score has a loss that is not a number (NaN): do not trust its accuracy either.")
    broken = [row.get("epoch", i) for i, row in enumerate(log) if has_nan_loss(row)]
    if broken:
        found.append(
            f"The loss is not a number (NaN) from epoch {format_number(broken[0])} on ({len(broken)} of "
            f"{len(log)} epochs): training diverged. A lower learning rate or fp32 usually helps."
        )
    for baseline in result.baselines:
        if baseline.top1 > reported.top1:
            found.append(f"The baseline “{baseline.name}” does better than this run.")
    found.extend(check_predictions(result, predictions))
    if has_reference and not log:
        found.append("A published curve was given, but this run logged no epochs to draw beside it.")
    return found


def has_nan_loss(row: Mapping[str, float]) -> bool:
    """Whether a loss of this log row is present but not finite."""
    return any(key.endswith("_loss") and math.isnan(read_number(row, key)) for key in row)


def check_predictions(result: RunResult, predictions: Predictions) -> list[str]:
    """Contradictions between the reported score and the predictions, and collapsed predictions."""
    count, reported, found = len(predictions.targets), result.reported, []
    if count == 0:
        return ["There are no predictions, so the tables below are empty."]
    top1 = 100 * float(np.mean(predictions.targets == predictions.predicted))
    if count != reported.samples or not abs(top1 - reported.top1) <= 50 / count:
        found.append(
            f"The tables below come from {count:,} predictions with {top1:.2f} % right, the reported score "
            f"is {reported.top1:.2f} % of {reported.samples:,}: the two do not belong together."
        )
    if len(np.unique(predictions.predicted)) == 1 < len(np.unique(predictions.targets)):
        name = result.classes[int(predictions.predicted[0])]
        found.append(f"Every image was given the same class, “{shorten(name, 60)}”: the head learnt nothing.")
    return found
