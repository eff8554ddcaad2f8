"""The end of every run on images of several classes: tables, report, result, and what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.intervals import precision_interval
from probes.multi_label import precision_table, prediction_table
from probes.recipe import dump_recipe

if TYPE_CHECKING:
    from probes.multi_label import LabelScores, PrecisionScore
    from probes.results import RunResult
    from probes.runs import RunFolder


def finish_multi_label(
    run: RunFolder, recipe: Any, result: RunResult, scores: Sequence[PrecisionScore], labels: LabelScores
) -> None:
    """Write `predictions.csv`, `average_precision.csv`, `report.html` and, last, `result.json`; print the outcome.

    Args:
        run: where to.
        recipe: shown in the report.
        result: all but the scores, which are of another kind here.
        scores: the reported one first.
        labels: what the reported one stands on.
    """
    if not run.writes:
        return
    absent = int(np.isnan(labels.precisions).sum())
    content = result.to_json()
    content["scores"] = [dataclasses.asdict(score) for score in scores]
    content["measured"] = {"mean_average_precision": labels.mean}
    content["interval"] = precision_interval(labels.values, labels.shown)
    if absent:
        content["notes"].append(f"{absent} class(es) have no image and no part in the mean.")
    run.write_text("predictions.csv", prediction_table(result.classes, labels))
    run.write_text("average_precision.csv", precision_table(result.classes, labels.shown, labels.precisions))
    run.write_text("report.html", _render(run, recipe, content, labels))
    run.write_json("result.json", content)
    print_multi_label(content)
    print(f"report: {run.path / 'report.html'}")


def print_multi_label(content: dict[str, Any]) -> None:
    """Scores, interval, expectations and notes as plain lines."""
    print()
    for score in content["scores"]:
        chosen = {"schedule": "the recipe", score["split"]: f"{score['split']} itself: an oracle"}
        by = chosen.get(score["chosen_by"], score["chosen_by"])
        what = score["setting"] or f"epoch {score['epoch']}"
        how = "nothing trained" if score["chosen_by"] == "nothing" else f"{what} (chosen by {by})"
        print(
            f"{score['name']:>9}  mean average precision {score['mean_average_precision']:6.2f}  on {score['samples']} "
            f"{score['split']} images, {how}"
        )
    low, high = content["interval"]
    print(f" interval  {low:.2f} to {high:.2f} (95 %, bootstrap over images)")
    for item in content["expectations"]:
        measured = "not measured" if item["measured"] is None else f"{item['measured']:.2f}"
        print(f" expected  {item['name']} {item['expected']:.2f}, measured {measured}: {item['verdict']}")
    for note in content["notes"]:
        print(f"     note  {note}")


def _render(run: RunFolder, recipe: Any, content: dict[str, Any], labels: LabelScores) -> str:
    """The report: one page that needs nothing else."""
    from probes.figures import draw_curves
    from probes.report import build_environment
    from probes.results import Score

    reported, log, shown = content["scores"][0], run.read_log(), labels.shown
    place = Score(reported["name"], reported["split"], "", reported["epoch"], np.nan, np.nan, np.nan, len(shown))
    order = np.argsort(np.where(np.isnan(labels.precisions), np.inf, labels.precisions), kind="stable")
    page = build_environment(len(shown)).get_template("multi_label.html.j2")
    return page.render(
        result=content,
        reported=reported,
        mean=labels.mean,
        chance=100 * float(shown[:, shown.any(axis=0)].mean()),
        curves=draw_curves(log, None, place) if log else [],
        rows=[(content["classes"][i], int(shown[:, i].sum()), float(labels.precisions[i])) for i in order],
        recipe_yaml=dump_recipe(recipe),
        environment=json.loads((run.path / "environment.json").read_text(encoding="utf-8")),
    )
