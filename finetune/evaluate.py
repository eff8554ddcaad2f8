"""`python -m finetune.evaluate RUN|RECIPE [key=value …]`: score a classifier on any images, without training.

RUN is a finished fine-tune: its exported model and its classes are taken, and any key of its recipe can be changed
(`data.test=…`). RECIPE is a YAML file whose `model.weights` names a checkpoint with a head; its classes are those of
`data.test`, sorted.

The encoder computes in `compute.precision`; that of a RUN is what it was trained in unless it is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.sections import EvaluateDataSection, ExpectedSection, FinetuneRecipe, HeadSection
from probes.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
from probes.recipe import load_recipe
from probes.results import RunResult
from probes.sections import ModelSection, RecipeError, RunSection
from probes.zeroshot_sections import ComputeSection

if TYPE_CHECKING:
    import torch

    from eva_clip.classifier import Classifier
    from probes.runs import RunFolder
    from probes.splits import Split


@dataclass
class EvaluateRecipe:
    """The sections that an evaluation reads; others of a fine-tune's recipe are ignored."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    head: HeadSection = field(default_factory=HeadSection)
    data: EvaluateDataSection = field(default_factory=EvaluateDataSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    expected: ExpectedSection = field(default_factory=ExpectedSection)


def open_split(recipe: EvaluateRecipe, classes: list[str] | None) -> tuple[Split, list[str], list[str]]:
    """`data.test` with targets among a run's classes, these classes, and notes; None takes the data's own classes.

    Raises:
        RecipeError: the data have a class that the run was not trained on.
    """
    import numpy as np

    from probes.source_contract import some
    from probes.splits import Split, open_evaluation_split

    found = open_evaluation_split(recipe.data)
    if classes is None:
        return found.test, found.classes, found.notes
    unknown = [name for name in found.classes if name not in classes]
    if unknown:
        raise RecipeError(
            f"data.test has {len(unknown)} class(es) that the run was not trained on: {', '.join(unknown[:5])}; "
            f"expected some of {', '.join(classes[:5])}, …; rename or remove them"
        )
    position = np.array([classes.index(name) for name in found.classes], dtype=np.int64)
    counts = found.multi_hot.sum(axis=0)
    absent = [name for name in classes if name not in found.classes or not counts[found.classes.index(name)]]
    notes = list(found.notes)
    if absent:
        notes.append(f"data.test has no image of {len(absent)} of the {len(classes)} classes: {some(absent)}")
    shown = None
    if found.test.multi_hot is not None:
        shown = np.zeros((len(found.test), len(classes)), dtype=np.bool_)
        shown[:, position] = found.test.multi_hot
    split = Split("test", found.test.source, found.test.indices, position[found.test.targets], shown)
    return split, classes, notes


def note_chooser(run: Path, split: Split, notes: list[str]) -> None:
    """Note that the images are those which chose the run's weights."""
    chosen = json.loads((run / "data.json").read_text(encoding="utf-8"))["splits"]
    for name in ("holdout", "val"):
        if name in chosen and chosen[name]["fingerprint"] == split.fingerprint():
            notes.append(f"data.test is the run's {name}, which chose its weights: the score is too favourable.")


def open_classifier(recipe: EvaluateRecipe, classes: list[str], run: Path | None) -> tuple[Classifier, str]:
    """The classifier, and what was loaded.

    Raises:
        RecipeError: the checkpoint has no head of that many classes.
    """
    from eva_clip import build_classifier

    weights = recipe.model.weights if run is None else str(run / "model.safetensors")
    model = build_classifier(
        recipe.model.name,
        len(classes),
        image_size=recipe.model.image_size,
        pool=recipe.head.pool,
        head=recipe.head.kind if run is None else "linear",  # a run's BatchNorm is folded in its export
        checkpoint=weights,
        pos_embed=recipe.model.pos_embed,
    )
    report = model.load_report
    assert report is not None
    if any(name.startswith("classifier.") for name in report.missing):
        raise RecipeError(
            f"{weights} has no head of {len(classes)} classes, which data.test has; nothing can be scored"
        )
    return model.eval(), report.summary()


def execute(recipe: EvaluateRecipe, recipe_path: str, run: Path | None) -> None:
    """One evaluation, up to its report."""
    start = time.monotonic()
    from probes.plan import check_model
    from probes.precision import settle_precision
    from probes.runs import RunFolder
    from probes.seen import note_seen_weights
    from probes.splits import Evaluation, describe

    stored = json.loads((run / "result.json").read_text(encoding="utf-8")) if run else None
    if run is None:
        check_model(recipe.model)
    if run is None and recipe.model.weights in ("pretrained", "random"):
        raise RecipeError(f"model.weights is {recipe.model.weights!r}, which has no classifier; name a checkpoint file")
    split, classes, notes = open_split(recipe, stored["classes"] if stored else None)
    evaluation = Evaluation(classes, split, notes)
    weights = str(run / "model.safetensors") if run else recipe.model.weights
    note_seen_weights(weights, evaluation)
    if run:
        note_chooser(run, split, notes)
    recipe, precision = settle_precision(recipe)
    folder = RunFolder.create(recipe, recipe_path)
    folder.record_data(describe(evaluation))
    print(f"run folder: {folder.path}", *notes, sep="\nnote: ", flush=True)

    import torch

    from eva_clip.transforms import build_eval_transform
    from probes.data import SplitDataset, SplitLoader, collate
    from probes.scoring import predict_logits

    model, loaded = open_classifier(recipe, classes, run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    spec, data = model.spec, recipe.data
    view = build_eval_transform(spec.vision.image_size, spec.image_mean, spec.image_std)
    dataset = SplitDataset(split, view, recipe.run.seed, data.on_corrupt)
    batch = recipe.compute.batch
    loader: Any = SplitLoader(dataset, batch_size=batch, num_workers=data.workers, collate_fn=collate)
    device = next(model.parameters()).device
    logits, index = predict_logits(model, loader, device, "image", recipe.compute.precision)
    skipped = len(split) - len(index)
    result = RunResult(
        title=f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}",
        method="finetune.evaluate",
        classes=classes,
        split_sizes={"test": len(split)},
        scores=[],
        notes=[*notes, *([f"{skipped} unreadable image(s) were left out."] if skipped else [])],
        facts={
            "encoder": recipe.model.name,
            "weights": f"{weights}: {loaded}",
            "answers": f"among the classes of the {recipe.data.classes_of}",
            "image size": f"{spec.vision.image_size} px",
            "precision": precision,
            "duration": f"{time.monotonic() - start:.0f} s",
        },
    )
    finish(folder, recipe, result, logits, index, split)


def finish(
    run: RunFolder, recipe: EvaluateRecipe, result: RunResult, logits: torch.Tensor, index: torch.Tensor, split: Split
) -> None:
    """Score logits [N, C] of the images at positions `index` [N] of the split, and report."""
    from finetune.answers import take_answers
    from probes.finish import finish_run
    from probes.multi_label import PrecisionScore
    from probes.multi_label_finish import finish_multi_label
    from probes.scoring import label_scores
    from probes.zeroshot import score_logits

    what = "the weights as they are"
    if split.multi_hot is not None:
        labels = label_scores(logits, index, split)
        score = PrecisionScore("evaluated", "test", "schedule", 0, labels.mean, None, len(index), what)
        finish_multi_label(run, recipe, result, [score], labels)
        return
    answers = take_answers(logits, index, result.classes, split, recipe.data.classes_of)
    predictions, found = score_logits(answers.logits, index, answers.split)
    result = dataclasses.replace(result, classes=answers.classes, notes=[*result.notes, *answers.notes])
    found = dataclasses.replace(found, name="evaluated", chosen_by="schedule", setting=what)
    finish_run(run, recipe, dataclasses.replace(result, scores=[found]), predictions, answers.split)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.evaluate", description="Score a finished fine-tune, or a checkpoint, on any images."
    )
    parser.add_argument("target", type=Path, help="run folder of python -m finetune, or a recipe with model.weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.test=photos/new")
    arguments = parser.parse_intermixed_args(argv)
    try:
        target: Path = arguments.target
        run = target if target.is_dir() else None
        if run and not all((run / name).is_file() for name in ("recipe.yaml", "result.json", "model.safetensors")):
            raise RecipeError(f"{run} holds no finished fine-tune; expected the run folder of python -m finetune")
        path, first = target, []
        if run:  # its own folder and expectations are those of its training; its precision is taken
            path = target / "recipe.yaml"
            trained = load_recipe(path, schema=FinetuneRecipe).trainer.precision
            first = ["run.dir=null", "run.on_existing=error", "expected=null", f"compute.precision={trained}"]
        recipe = load_recipe(path, [*first, *arguments.overrides], EvaluateRecipe, other_sections=True)
        execute(recipe, str(path), run)
    except (ValueError, OSError) as error:
        if os.environ.get("EVA_CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
