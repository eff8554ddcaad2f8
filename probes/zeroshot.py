"""`python -m probes.zeroshot RECIPE`: classify images by the names of their classes, without training."""

from __future__ import annotations

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

    from probes.splits import Split


def plan(recipe: ZeroShotRecipe) -> dict[str, Any]:
    """What `--plan` prints: sizes and the class texts."""
    from probes.splits import open_evaluation_split

    splits = open_evaluation_split(recipe.data)
    return {
        "model": recipe.model.name,
        "images": len(splits.test),
        "classes": read_class_names(recipe, splits.classes),
        "templates": recipe.prompts.templates,
        "batch": recipe.compute.batch,
    }


def execute(recipe: ZeroShotRecipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    start = time.monotonic()
    from probes.runs import RunFolder
    from probes.splits import describe, open_evaluation_split

    splits = open_evaluation_split(recipe.data)
    names = read_class_names(recipe, splits.classes)
    run = RunFolder.create(recipe, recipe_path)
    run.write_json("data.json", describe(splits))
    print(f"run folder: {run.path}", flush=True)

    from probes.embedding import build_towers, embed_images, evaluation_loader
    from probes.finish import finish_run
    from probes.heads import build_zero_shot_weights

    model = build_towers(recipe.model, recipe.compute.precision)
    weights = build_zero_shot_weights(model, names, recipe.prompts.templates).cpu()
    batches = evaluation_loader(model, splits.test, recipe.data, recipe.compute.batch)
    images, index = embed_images(model, batches, "test")
    logits = model.logit_scale.exp().float().cpu() * images @ weights.T  # [N, C]
    skipped = len(splits.test) - len(index)
    predictions, score = score_logits(logits.detach(), index, splits.test)
    recall = mean_recall(predictions)
    measured = {"top1": score.top1, "top5": score.top5, "mean_recall": recall}
    result = RunResult(
        title=f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}",
        method="probes.zeroshot",
        classes=splits.classes,
        split_sizes={"test": len(splits.test)},
        scores=[score],
        expectations=recipe.expected.compare(recipe.model.name, measured),
        notes=[f"{skipped} unreadable image(s) were left out."] if skipped else [],
        facts={
            "encoder": recipe.model.name,
            "mean per-class recall": f"{recall:.2f} %",
            "prompts": " | ".join(recipe.prompts.templates),
            "duration": f"{time.monotonic() - start:.0f} s",
        },
    )
    finish_run(run, recipe, result, predictions, splits.test)
    print(f"mean per-class recall {recall:.2f}")


def read_class_names(recipe: ZeroShotRecipe, classes: Sequence[str]) -> list[str]:
    """The text of each class, in the order of `classes`.

    Raises:
        RecipeError: the file of names is missing, or has another number of names.
    """
    from probes.sections import RecipeError

    if recipe.prompts.class_names is None:
        return [name.replace("-", " ").replace("_", " ") for name in classes]
    path = Path(recipe.prompts.class_names)
    if not path.is_file():
        raise RecipeError(f"prompts.class_names: no file at {path}; expected one class name a line")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != len(classes):
        raise RecipeError(f"{path} has {len(names)} names and the data {len(classes)} classes; expected as many")
    return names


def score_logits(logits: torch.Tensor, index: torch.Tensor, split: Split) -> tuple[Predictions, Score]:
    """Predictions and score of logits [N, C] for the samples at positions `index` [N] of a split."""
    import torch

    from probes.metrics import SplitMeter
    from probes.scoring import collect_predictions

    targets = torch.from_numpy(split.targets)[index]
    meter = SplitMeter(logits.shape[1])
    meter.update(logits, targets)
    values = meter.compute_and_reset()
    score = Score("zero-shot", split.name, "nothing", 0, values["acc1"], values["acc5"], values["loss"], len(targets))
    return collect_predictions(logits.softmax(dim=1), targets, index, split), score


def mean_recall(predictions: Predictions) -> float:
    """Mean over the classes that occur of the share of their images that were recognised, in percent."""
    from sklearn.metrics import balanced_accuracy_score

    return 100 * float(balanced_accuracy_score(predictions.targets, predictions.predicted))


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
