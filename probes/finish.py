"""The end of every run: predictions, head, report, result, and what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probes.confusion import mean_recall
from probes.intervals import summarise_repeats, wilson_interval
from probes.recipe import dump_recipe
from probes.results import Predictions, RunResult
from probes.scoring import predictions_csv
from probes.sections import RecipeError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from probes.figures import LogRows
    from probes.runs import RunFolder
    from probes.splits import Split, Splits
    from probes.store_table import EncoderFacts


def reported_split(splits: Splits, chose: str = "the epoch", seeds: Sequence[int] = ()) -> Split:
    """The split that a run's figure stands on: test, or what selects when there is no test (and then a note says so).

    Args:
        splits: the data; notes are added to it.
        chose: what the selection split chooses; "" where other images do.
        seeds: of the repetitions, each of which has a hold-out of its own.

    Raises:
        RecipeError: there is neither.
    """
    if splits.test is not None:
        return splits.test
    if splits.selection is None:
        raise RecipeError(
            "there is nothing to score on; give data.test, or data.val, or data.holdout=0.2 (a fifth of train)"
        )
    name = splits.selection.name
    also = f"which also chose {chose}, and is optimistic by as much" if chose else "which had no part in the choice"
    splits.notes.append(f"There is no test split: the reported score is on {name}, {also}. Nothing is fitted on it.")
    if len(seeds) > 1 and name == "holdout":
        splits.notes.append("Each seed is scored on its own hold-out, and fitted on the rest of train.")
    return splits.selection


def save_head(
    run: RunFolder,
    recipe: Any,
    encoder: EncoderFacts,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    classes: list[str],
    fitted: Sequence[Split],
) -> None:
    """Write the reported head as `head.safetensors`, with all that is needed to use it in its metadata.

    The metadata is one key, "probe": JSON with `model`, `encoder_sha256`, `features` (pool, projected, l2norm),
    `image_size` (pixels), `head` (its kind) and `classes`. One, because safetensors writes several in a random order,
    and equal runs would differ in their bytes.

    Args:
        run: where to.
        recipe: its sections `model` and `features` are written.
        encoder: what the head was trained on.
        kind: "bn_linear" or "linear".
        tensors: state of `build_head(kind, ...)`.
        classes: names.
        fitted: the splits that the head was fitted on; `fitted_on.npz` beside it names their images by digests
            (`probes.seen`), so that none of them judges what starts from it.
    """
    if not run.writes:
        return
    from safetensors.torch import save_file

    from probes.seen import Seen

    probe = {
        "model": recipe.model.name,
        "encoder_sha256": encoder.sha256,
        "features": {key: getattr(recipe.features, key) for key in ("pool", "projected", "l2norm")},
        "image_size": encoder.image_size,
        "head": kind,
        "classes": classes,
    }
    state = {key: value.contiguous().cpu() for key, value in tensors.items()}
    Seen.of(fitted).write(run)
    save_file(state, run.path / "head.safetensors", metadata={"probe": json.dumps(probe, sort_keys=True)})


def finish_run(
    run: RunFolder,
    recipe: Any,
    result: RunResult,
    predictions: Predictions,
    split: Split,
    *,
    reference_log: LogRows | None = None,
) -> None:
    """Write `predictions.csv`, `report.html` and, last, `result.json`; print the outcome.

    Args:
        run: where to.
        recipe: shown in the report.
        result: is completed with the interval and the mean per-class recall.
        predictions: of the reported score.
        split: what was predicted.
        reference_log: rows of a published run, drawn beside this one's.
    """
    if not run.writes:
        return
    from probes.report import write_report

    def read_image(position: int) -> Image.Image:
        return _open_image(split, by_key[predictions.keys[position]])

    right = int((predictions.predicted == predictions.targets).sum())
    interval = wilson_interval(right, len(predictions.targets))
    measured = {"mean_recall": mean_recall(predictions), **result.measured}
    result = dataclasses.replace(result, interval=interval, measured=measured)
    by_key = {key: position for position, key in enumerate(split.keys)}
    run.write_text("predictions.csv", predictions_csv(predictions, result.classes))
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    write_report(
        run.path / "report.html",
        result=result,
        log=run.read_log(),
        predictions=predictions,
        read_image=read_image,
        recipe_yaml=dump_recipe(recipe),
        environment=environment,
        reference_log=reference_log,
    )
    run.write_json("result.json", result.to_json())
    print_result(result)
    print(f"report: {run.path / 'report.html'}")


def print_result(result: RunResult) -> None:
    """Scores, baselines and measured beside expected, as plain lines."""
    print()
    for score in result.scores:
        chosen = {
            "schedule": "the recipe" if score.setting else "the schedule's end",
            score.split: f"{score.split} itself: an oracle",
        }
        by = chosen.get(score.chosen_by, score.chosen_by)
        what = score.setting or f"epoch {score.epoch}"
        how = "nothing trained" if score.chosen_by == "nothing" else f"{what} (chosen by {by})"
        print(
            f"{score.name:>9}  top-1 {score.top1:6.2f}  top-5 {score.top5:6.2f}  on {score.samples} {score.split} "
            f"images, {how}"
        )
    if result.interval:
        recall = result.measured.get("mean_recall")
        balanced = "" if recall is None else f"; mean per-class recall {recall:.2f}"
        print(f" interval  {result.interval[0]:.2f} to {result.interval[1]:.2f} (95 %, Wilson){balanced}")
    for line in summarise_repeats(result.repeats):
        print(f"  repeats  {line}")
    for baseline in result.baselines:
        difference = result.reported.top1 - baseline.top1
        near = "" if baseline.spread is None else "; {:.2f} to {:.2f} with settings near it".format(*baseline.spread)
        print(f" baseline  top-1 {baseline.top1:6.2f}  {baseline.name} (ours {difference:+.2f}{near})")
    for item in result.expectations:
        measured = "not measured" if item.measured is None else f"{item.measured:.2f}"
        print(f" expected  {item.name} {item.expected:.2f}, measured {measured}: {item.verdict}")
    for note in result.notes:
        print(f"     note  {note}")


def _open_image(split: Split, position: int) -> Image.Image:
    from eva_clip.transforms import to_rgb

    return to_rgb(split.source.image(int(split.indices[position])))
