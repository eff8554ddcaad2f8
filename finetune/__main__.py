"""`python -m finetune RECIPE`: train the encoder and a classifier. Heavy imports wait until work begins."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.sections import FinetuneRecipe
from probes.cli import run_command
from probes.results import RunResult

if TYPE_CHECKING:
    from finetune.fit import Fitted
    from probes.splits import Split, Splits


def plan(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What `--plan` prints."""
    from finetune.memory import measure_room
    from finetune.plan import plan_finetune

    return plan_finetune(recipe, measure_room())


def execute(recipe: FinetuneRecipe, recipe_path: str) -> None:
    """One run, from recipe to report and a model that timm opens."""
    start = time.monotonic()
    from finetune.memory import measure_room
    from finetune.plan import check_recipe
    from finetune.resume import settle_recipe, write_settled
    from finetune.start_check import check_start
    from finetune.unseen import seen_by_fine_tune
    from probes.finish import finish_run, reported_split
    from probes.linear import EpochLines
    from probes.precision import settle_precision
    from probes.reference_curve import read_reference
    from probes.runs import RunFolder
    from probes.seen import note_seen_weights
    from probes.splits import describe, prepare_splits

    check_recipe(recipe)
    splits = prepare_splits(recipe.data, multi_label=True)
    earlier = note_seen_weights(recipe.model.weights, splits)
    reported = reported_split(splits)
    check_recipe(recipe, len(splits.train))
    recipe, precision = settle_precision(recipe)
    planned, memory, changed = settle_recipe(recipe, len(splits.classes), measure_room())
    check_start(recipe, splits)
    run = RunFolder.create(recipe, recipe_path)
    write_settled(run, planned)
    run.record_data(describe(splits))
    seen_by_fine_tune(recipe, splits).joined(earlier).write(run)
    reference = read_reference(recipe.expected, splits.notes)
    print(f"run folder: {run.path}", *splits.notes, *changed, sep="\nnote: ", flush=True)

    from finetune.finish import collect_precisions, export, load_reported, score_reported
    from finetune.fit import fit_classifier
    from probes.multi_label_finish import finish_multi_label
    from probes.scoring import label_scores, predict

    fitted = fit_classifier(planned, splits, run, on_row=EpochLines(run, recipe.schedule.epochs, reference))
    weights = load_reported(run, fitted)
    scored = score_reported(fitted, reported.name)
    samples = len(scored[1])
    result = summarise(recipe, recipe_path, splits, fitted, reported, samples)
    export(run, fitted.module)
    result.facts["weights of model.safetensors"] = weights
    result.facts["precision"] = precision
    result.facts["peak memory"] = describe_peak(memory.tensors)
    if reference:
        result.facts["published curve"] = reference.summarise(run.read_log())
    result.facts["duration"] = f"{time.monotonic() - start:.0f} s"
    if reported.multi_hot is not None:
        precisions = collect_precisions(fitted.module, samples, reported.name)
        finish_multi_label(run, recipe, result, precisions, label_scores(*scored, reported))
        return
    rows = reference.rows if reference else None
    finish_run(run, recipe, result, predict(*scored, reported), reported, reference_log=rows)


def summarise(
    recipe: FinetuneRecipe, recipe_path: str, splits: Splits, fitted: Fitted, reported: Split, samples: int
) -> RunResult:
    """Scores, expectations, notes and facts of a finished fit."""
    from finetune.finish import collect_scores, compare_expected

    module = fitted.module
    scores = [] if module.multi_label else collect_scores(module, samples, reported.name)
    skipped = [
        f"{len(keys)} unreadable image(s) of {name} were left out, the first {min(keys)}."
        for name, keys in fitted.data.skipped.items()
        if keys
    ]
    trainable = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    return RunResult(
        title=f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}",
        method="finetune",
        classes=splits.classes,
        split_sizes={name: len(split) for name, split in splits.named.items()},
        scores=scores,
        expectations=compare_expected(recipe.expected, scores),
        notes=[*splits.notes, *skipped],
        facts={
            "encoder": recipe.model.name,
            "loaded": "; ".join(fitted.notes),
            "trained": f"{recipe.tune.what}, {trainable:,} parameters",
            "image size": f"{module.model.spec.vision.image_size} px",
            "average": "none" if module.ema is None else f"decay {module.ema.decay}, {module.ema.updates} updates",
        },
    )


def describe_peak(predicted: float) -> str:
    """The planner's tensors on a GPU beside the measured memory, GiB."""
    from finetune.compute_cost import measure_peak_gib

    measured, what = measure_peak_gib()
    return f"{measured:.2f} GiB measured ({what}), {predicted:.2f} GiB of tensors predicted for one GPU"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m finetune",
        "Train the encoder and a classifier; the run ends with a report and a model that timm opens.",
        schema=FinetuneRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
