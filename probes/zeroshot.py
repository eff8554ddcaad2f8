"""`python -m probes.zeroshot RECIPE`: classify images by the names of their classes, without training."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.cli import run_command
from probes.results import Predictions, RunResult, Score
from probes.zeroshot_sections import ZeroShotRecipe

if TYPE_CHECKING:
    import torch

    from eva_clip.models import EvaCLIP
    from probes.prompts import Prompts
    from probes.runs import RunFolder
    from probes.splits import Evaluation, Split


def plan(recipe: ZeroShotRecipe) -> dict[str, Any]:
    """What `--plan` prints: sizes and the class texts."""
    splits, prompts = _open(recipe)
    return {
        "model": recipe.model.name,
        "images": len(splits.test),
        "classes": prompts.names,
        "templates": prompts.templates,
        "prompts": prompts.source,
        "scoring": recipe.scoring.kind,
        "batch": recipe.compute.batch,
    }


def execute(recipe: ZeroShotRecipe, recipe_path: str, towers: EvaCLIP | None = None) -> None:
    """One run, from recipe to report, on all processes that torchrun started; `towers` are built if None."""
    from probes.processes import join_processes

    splits, prompts = _open(recipe)
    with join_processes():
        _run(recipe, recipe_path, splits, prompts, towers)


def _run(
    recipe: ZeroShotRecipe, recipe_path: str, splits: Evaluation, prompts: Prompts, towers: EvaCLIP | None
) -> None:
    start = time.monotonic()
    from probes.precision import settle_precision
    from probes.runs import RunFolder
    from probes.splits import describe

    recipe, precision = settle_precision(recipe)
    run = RunFolder.create(recipe, recipe_path)
    run.record_data(describe(splits))
    run.write_json("prompts.json", vars(prompts))
    print(f"run folder: {run.path}", flush=True)

    from probes.embedding import build_towers, embed_images, evaluation_loader
    from probes.heads import build_zero_shot_weights

    model = towers or build_towers(recipe.model, recipe.compute.precision)
    weights = build_zero_shot_weights(model, prompts.names, prompts.templates).cpu()
    batches = evaluation_loader(model, splits.test, recipe.data, recipe.compute.batch)
    images, index = embed_images(model, batches, "test")
    logits = (model.logit_scale.exp().float().cpu() * images @ weights.T).detach()  # [N, C]
    skipped, notes = len(splits.test) - len(index), list(splits.notes)
    if skipped:
        notes.append(f"{skipped} unreadable {splits.test.source.media}(s) were left out.")
    facts = {
        "encoder": recipe.model.name,
        "prompts": _shorten(prompts.templates),
        "texts from": prompts.source,
        "precision": precision,
        "duration": f"{time.monotonic() - start:.0f} s",
    }
    finish = _finish_multi_label if recipe.scoring.kind == "multi_label" else _finish_single_label
    finish(run, recipe, recipe_path, logits, splits, index, notes, facts)


def _open(recipe: ZeroShotRecipe) -> tuple[Evaluation, Prompts]:
    """The images and the texts of their classes.

    Raises:
        RecipeError: either is missing or wrong, or the images have several classes and `scoring.kind` is "single".
    """
    from probes.prompts import resolve_prompts
    from probes.sections import RecipeError
    from probes.splits import open_evaluation_split

    splits = open_evaluation_split(recipe.data)
    if recipe.scoring.kind == "single" and splits.test.multi_hot is not None:
        raise RecipeError(f"data.test: {recipe.data.test} shows several classes an image; use scoring.kind=multi_label")
    return splits, resolve_prompts(recipe.prompts, splits)


def _finish_single_label(
    run: RunFolder,
    recipe: ZeroShotRecipe,
    recipe_path: str,
    logits: torch.Tensor,
    splits: Evaluation,
    index: torch.Tensor,
    notes: list[str],
    facts: dict[str, str],
) -> None:
    """Score, compare with the recipe's figures, report."""
    from probes.confusion import mean_recall
    from probes.finish import finish_run

    predictions, score = score_logits(logits, index, splits.test)
    measured = {
        "top1": score.top1,
        "top5": score.top5,
        "mean_recall": mean_recall(predictions),
        "mean_top1_top5": (score.top1 + score.top5) / 2,
    }
    result = RunResult(
        title=_title(recipe_path),
        method="probes.zeroshot",
        classes=splits.classes,
        split_sizes={"test": len(splits.test)},
        scores=[score],
        measured=measured,
        expectations=recipe.expected.compare(recipe.model.name, measured),
        notes=notes,
        facts={
            **facts,
            "mean of top-1 and top-5": f"{measured['mean_top1_top5']:.2f} %",
        },
    )
    finish_run(run, recipe, result, predictions, splits.test)
    print(f"mean of top-1 and top-5 {measured['mean_top1_top5']:.2f}")


def _finish_multi_label(
    run: RunFolder,
    recipe: ZeroShotRecipe,
    recipe_path: str,
    logits: torch.Tensor,
    splits: Evaluation,
    index: torch.Tensor,
    notes: list[str],
    facts: dict[str, str],
) -> None:
    """Score by average precision, compare with the recipe's figure, report."""
    from probes.multi_label import PrecisionScore
    from probes.multi_label_finish import finish_multi_label
    from probes.scoring import label_scores

    test = dataclasses.replace(splits.test, multi_hot=splits.multi_hot)
    labels = label_scores(logits, index, test, log_odds=False)
    result = RunResult(
        title=_title(recipe_path),
        method="probes.zeroshot",
        classes=splits.classes,
        split_sizes={"test": len(test)},
        scores=[],
        expectations=recipe.expected.compare(recipe.model.name, {"mean_average_precision": labels.mean}),
        notes=notes,
        facts=facts,
    )
    score = PrecisionScore("zero-shot", "test", "nothing", 0, labels.mean, None, len(index))
    finish_multi_label(run, recipe, result, [score], labels)


def _title(recipe_path: str) -> str:
    """Folder and name of the recipe."""
    return f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}"


def _shorten(templates: Sequence[str], most: int = 4) -> str:
    """All templates, or the first few and their number; `prompts.json` has them all."""
    if len(templates) <= most:
        return " | ".join(templates)
    return " | ".join(templates[:most]) + f" | … ({len(templates)} in all)"


def score_logits(logits: torch.Tensor, index: torch.Tensor, split: Split) -> tuple[Predictions, Score]:
    """Predictions and score of logits [N, C] for the samples at positions `index` [N] of a split.

    Raises:
        ValueError: some are not finite.
    """
    import torch

    from probes.metrics import SplitMeter
    from probes.scoring import predict

    predictions, targets = predict(logits, index, split), torch.from_numpy(split.targets)[index]
    meter = SplitMeter(logits.shape[1])
    meter.update(logits, targets)
    values = meter.compute_and_reset()
    score = Score("zero-shot", split.name, "nothing", 0, values["acc1"], values["acc5"], values["loss"], len(targets))
    return predictions, score


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.zeroshot",
        "Classify images by the names of their classes through the text tower; nothing is trained.",
        schema=ZeroShotRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
