"""The end of a fine-tune on images of several classes: average precisions, predictions, and the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.multi_label import average_precisions, precision_table
from probes.recipe import dump_recipe

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.module import FinetuneModule
    from finetune.sections import FinetuneRecipe
    from probes.results import RunResult
    from probes.runs import RunFolder
    from probes.splits import Split


def collect_precisions(module: FinetuneModule, samples: int, split: str) -> list[dict[str, Any]]:
    """Mean average precision on `split`, the reported one first, in the order of `finetune.finish.collect_scores`."""
    history = module.history
    prefixes = ["ema_", ""] if module.ema is not None else [""]

    def score(name: str, chosen_by: str, row: dict[str, float], prefix: str) -> dict[str, Any]:
        precision, loss = (row[f"{prefix}{split}_{key}"] for key in ("mean_ap", "loss"))
        facts = {"name": name, "split": split, "chosen_by": chosen_by, "epoch": int(row["epoch"])}
        return {**facts, "mean_average_precision": precision, "loss": loss, "samples": samples}

    scores = []
    if module.selected is not None:
        row = next(row for row in history if row["epoch"] == module.selected["epoch"])
        prefix = "ema_" if module.selected["weights"] == "ema" else ""
        scores.append(score("selected", str(module.selection_name), row, prefix))
    for prefix in prefixes:
        kind = prefix.removesuffix("_") or "raw"
        best = max(history, key=lambda row, prefix=prefix: row[f"{prefix}{split}_mean_ap"])  # type: ignore[misc]
        scores.append(score(f"last_{kind}", "schedule", history[-1], prefix))
        scores.append(score(f"best_{kind}", split, best, prefix))
    return scores


@torch.no_grad()
def predict_logits(model: Classifier, batches: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits [N, C] of every readable image, each once, and their positions in the split [N]."""
    device = next(model.parameters()).device
    model.eval()
    rows, index = [], []
    for batch in batches:
        if len(batch["target"]):
            rows.append(model(batch["image"].to(device)).float().cpu())
            index.append(batch["index"])
    return torch.cat(rows).numpy(), torch.cat(index).numpy()


def finish_multi_label(
    run: RunFolder,
    recipe: FinetuneRecipe,
    result: RunResult,
    scores: Sequence[dict[str, Any]],
    split: Split,
    logits: NDArray[np.float32],
    index: NDArray[np.int64],
) -> None:
    """Write `predictions.csv`, `average_precision.csv`, `report.html` and, last, `result.json`; print the outcome.

    Args:
        run: where to.
        recipe: shown in the report.
        result: title, classes, sizes, notes and facts; it has no scores of its own.
        scores: from `collect_precisions`.
        split: what was predicted.
        logits: [N, C] of the reported weights.
        index: [N] position in the split of each row.
    """
    if not run.writes:
        return
    assert split.multi_hot is not None
    shown = split.multi_hot[index]
    precisions = average_precisions(logits, shown)
    absent = int(np.isnan(precisions).sum())
    notes = [*result.notes, *([f"{absent} class(es) have no image and no part in the mean."] if absent else [])]
    measured = {"mean_average_precision": float(np.nanmean(precisions))}
    content = {key: getattr(result, key) for key in ("title", "method", "classes", "split_sizes", "facts")}
    content |= {"scores": list(scores), "measured": measured, "notes": notes}
    keys = split.keys
    run.write_text("predictions.csv", _predictions_csv([keys[i] for i in index], shown, logits, result.classes))
    run.write_text("average_precision.csv", precision_table(result.classes, shown, precisions))
    run.write_text("report.html", _render(run, recipe, content, shown, precisions))
    run.write_json("result.json", content)
    print()
    for score in scores:
        oracle = f"{split.name} itself: an oracle" if score["chosen_by"] == split.name else score["chosen_by"]
        print(
            f"{score['name']:>9}  mean average precision {score['mean_average_precision']:6.2f}  on {score['samples']} "
            f"{split.name} images, epoch {score['epoch']} (chosen by {oracle})"
        )
    for note in notes:
        print(f"     note  {note}")
    print(f"report: {run.path / 'report.html'}")


def _predictions_csv(
    keys: Sequence[str], shown: NDArray[np.bool_], logits: NDArray[np.float32], classes: Sequence[str]
) -> str:
    """One line an image: key, labels, those of probability over one half, and the probability of every class."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["key", "labels", "predicted", *(f"probability of {name}" for name in classes)])
    for key, labels, row in zip(keys, shown, logits, strict=True):
        probability = torch.from_numpy(row).double().sigmoid().tolist()
        named = [
            "|".join(name for name, chosen in zip(classes, mask, strict=True) if chosen) for mask in (labels, row > 0)
        ]
        writer.writerow([key, *named, *(f"{value:.6f}" for value in probability)])
    return stream.getvalue()


def _render(
    run: RunFolder,
    recipe: FinetuneRecipe,
    content: dict[str, Any],
    shown: NDArray[np.bool_],
    precisions: NDArray[np.float64],
) -> str:
    """The report: one page that needs nothing else."""
    from probes.figures import draw_curves
    from probes.report import build_environment
    from probes.results import Score

    reported, log = content["scores"][0], run.read_log()
    place = Score(reported["name"], reported["split"], "", reported["epoch"], np.nan, np.nan, np.nan, len(shown))
    order = np.argsort(np.where(np.isnan(precisions), np.inf, precisions), kind="stable")
    page = build_environment(len(shown)).get_template("multi_label.html.j2")
    return page.render(
        result=content,
        reported=reported,
        mean=content["measured"]["mean_average_precision"],
        chance=100 * float(shown[:, shown.any(axis=0)].mean()),
        curves=draw_curves(log, None, place),
        rows=[(content["classes"][i], int(shown[:, i].sum()), float(precisions[i])) for i in order],
        recipe_yaml=dump_recipe(recipe),
        environment=json.loads((run.path / "environment.json").read_text(encoding="utf-8")),
    )
