"""`python -m probes.linear RECIPE`: train a linear head on a frozen encoder. Heavy imports wait until work begins."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.cli import run_command
from probes.launch import first_process_prints
from probes.recipe import Recipe
from probes.results import RunResult, Score, compare_expected

if TYPE_CHECKING:
    from probes.fit import Fitted
    from probes.reference_curve import ReferenceCurve
    from probes.runs import RunFolder
    from probes.splits import Split, Splits


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `--plan` prints."""
    if recipe.bank.lrs:
        from probes.bank_plan import plan_bank

        return plan_bank(recipe)
    from probes.plan import plan_linear

    return plan_linear(recipe)


def execute(recipe: Recipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    if recipe.bank.lrs:
        from probes.bank_run import execute_bank

        execute_bank(recipe, recipe_path)
        return
    start = time.monotonic()
    from probes.draws import describe_draws, draw_seeds, with_first_seed
    from probes.finish import finish_run, reported_split, save_head
    from probes.multi_label_finish import finish_multi_label
    from probes.multi_label_probe import check_multi_label_probe, collect_precisions
    from probes.plan import check_recipe
    from probes.precision import settle_precision
    from probes.reference_curve import read_reference
    from probes.runs import RunFolder
    from probes.seen import note_seen_weights
    from probes.splits import prepare_splits

    check_recipe(recipe)
    splits = prepare_splits(with_first_seed(recipe).data, multi_label=True)
    several = splits.train.multi_hot is not None
    if several:
        check_multi_label_probe(recipe)
    note_seen_weights(recipe.model.weights, splits)
    reported = reported_split(splits, seeds=recipe.run.seeds)
    check_recipe(recipe, len(splits.train))
    asked, precision = settle_precision(recipe)
    recipe = with_first_seed(asked)
    from probes.fit import check_machine, fit_probe

    check_machine(recipe)
    run = RunFolder.create(asked, recipe_path)
    run.record_data(describe_draws(splits, draw_seeds(recipe, splits)))
    reference = read_reference(recipe.expected, splits.notes)
    print(f"run folder: {run.path}", *splits.notes, sep="\nnote: ", flush=True)

    from probes.processes import join_trainer
    from probes.scoring import label_scores, predict

    fitted = fit_probe(recipe, splits, run=run, on_row=EpochLines(run, recipe.schedule.epochs, reference))
    module = fitted.module
    module.load_reported_head()
    with join_trainer():
        scored = fitted.predict(reported.name)
    save_head(run, recipe, fitted.encoder, recipe.head.kind, module.head.state_dict(), splits.classes, [splits.train])
    samples = len(scored[1])
    result = summarise(recipe, Path(recipe_path), splits, fitted, reported, samples)
    if several:
        result.facts.update(precision=precision, duration=f"{time.monotonic() - start:.0f} s")
        precisions = collect_precisions(module, samples, reported.name)
        finish_multi_label(run, recipe, result, precisions, label_scores(*scored, reported))
        return
    add_comparisons(result, recipe, splits, fitted, reported)
    if reference:
        result.facts["published curve"] = reference.summarise(run.read_log())
    result.facts.update(precision=precision, duration=f"{time.monotonic() - start:.0f} s")
    finish_run(
        run, recipe, result, predict(*scored, reported), reported, reference_log=reference.rows if reference else None
    )


def add_comparisons(result: RunResult, recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split) -> None:
    """Add what the run is beside: other seeds, and baselines."""
    from probes.baselines import compute_baselines
    from probes.processes import join_trainer

    result.repeats.extend(repeat_seeds(recipe, splits, fitted, result.reported))
    with join_trainer():
        baselines, left_out = compute_baselines(recipe, splits, fitted, reported)
    result.baselines.extend(baselines)
    result.notes.extend(left_out)


def repeat_seeds(recipe: Recipe, splits: Splits, fitted: Fitted, first: Score) -> list[dict[str, Any]]:
    """Rows of `run.seeds`: the first is the run's own, the others are trained here on the same extraction."""
    if len(recipe.run.seeds) < 2:
        return []
    from probes.draws import with_seed
    from probes.fit import fit_probe
    from probes.scoring import collect_scores

    assert fitted.tables is not None
    rows = [{"seed": recipe.run.seeds[0], "top1": first.top1}]
    for seed in recipe.run.seeds[1:]:
        drawn = with_seed(splits, recipe.data.holdout, seed)
        of_source = {name: fitted.tables[name].whole for name in drawn.named}
        tables = {name: table.take(drawn.named[name]) for name, table in of_source.items()}
        other = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=seed))
        module = fit_probe(other, drawn, tables=tables).module
        score = collect_scores(module, first.samples, first.split)[0]
        rows.append({"seed": seed, "top1": score.top1})
        print(f"seed {seed}: top-1 {score.top1:.2f}", flush=True)
    return rows


class EpochLines:
    """Writes every epoch's row into `log.txt`, and prints it where no progress bar shows it (at most every 2 s).

    Epochs of a recipe with a published log are compared with it; those that are off are always printed.
    """

    def __init__(self, run: RunFolder, epochs: int, reference: ReferenceCurve | None = None) -> None:
        self.run, self.epochs, self.last_line, self.reference = run, epochs, 0.0, reference

    def __call__(self, row: dict[str, float]) -> None:
        """Take one epoch's row."""
        from probes.progress import is_terminal

        self.run.append_log(row)
        now = time.monotonic()
        final = row["epoch"] == self.epochs - 1
        verdict = self.reference.compare(row) if self.reference else ""
        if is_terminal() or (now - self.last_line < 2 and not final):
            if verdict.startswith("off"):
                print(f"epoch {row['epoch']:.0f}: {verdict}", flush=True)
            return
        self.last_line = now
        end, what = ("_mean_ap", "mean AP") if "train_mean_ap" in row else ("_acc1", "top-1")
        accuracies = ", ".join(f"{k.removesuffix(end)} {v:.2f}" for k, v in row.items() if k.endswith(end))
        print(
            f"epoch {row['epoch']:.0f}/{self.epochs - 1}: lr {row['train_lr']:.4g}, loss {row['train_loss']:.4f}, "
            f"{what} {accuracies}{f'; {verdict}' if verdict else ''}",
            flush=True,
        )


def summarise(
    recipe: Recipe, recipe_path: Path, splits: Splits, fitted: Fitted, reported: Split, samples: int
) -> RunResult:
    """Scores, expectations, notes and facts of a finished fit."""
    from probes.scoring import collect_scores

    scores = [] if fitted.module.multi_label else collect_scores(fitted.module, samples, reported.name)
    skipped = [
        f"{len(keys)} unreadable image(s) of {name} were left out, the first {min(keys)}."
        for name, keys in fitted.data.skipped.items()
        if keys
    ]
    features = recipe.features
    return RunResult(
        title=f"{recipe_path.parent.name}/{recipe_path.stem}",
        method="probes.linear",
        classes=splits.classes,
        split_sizes={name: len(split) for name, split in splits.named.items()},
        scores=scores,
        expectations=compare_expected(recipe.expected, scores),
        notes=[*splits.notes, *skipped],
        facts={
            "encoder": recipe.model.name,
            "weights": fitted.encoder.loaded,
            "encoder sha256": fitted.encoder.sha256,
            "features": f"{features.pool}, {fitted.encoder.feature_dim}-d, {features.mode}",
            "image size": f"{fitted.encoder.image_size} px",
            "trainable parameters": f"{fitted.module.history[-1]['n_parameters']:,}",
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.linear",
        "Train a linear head on the features of a frozen encoder; the run ends with a report.",
        schema=Recipe,
        plan=plan,
        execute=first_process_prints()(execute),
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
