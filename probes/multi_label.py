"""Images that show several classes: average precision of each class, without a trained head."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from probes.runs import RunFolder
    from probes.splits import Evaluation
    from probes.zeroshot_sections import ZeroShotRecipe


def average_precisions(scores: NDArray[np.float32], shown: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision (the area under the steps, without interpolation) of each class in percent; no image, NaN.

    From the raw scores: a sigmoid on logits of this size would make many of them equal in float32.

    Args:
        scores: [N, C], higher for more likely.
        shown: [N, C], which classes each image shows.

    Returns:
        [C].
    """
    from sklearn.metrics import average_precision_score

    precisions = np.full(shown.shape[1], np.nan)
    for target in np.flatnonzero(shown.any(axis=0)):
        precisions[target] = 100 * average_precision_score(shown[:, target], scores[:, target])
    return precisions


def finish_multi_label(
    run: RunFolder,
    recipe: ZeroShotRecipe,
    logits: torch.Tensor,
    splits: Evaluation,
    index: torch.Tensor,
    notes: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    """Write `average_precision.csv` and, last, `result.json`; print the mean over the classes that occur.

    Args:
        run: where to.
        recipe: its expected figures are compared.
        logits: [N, C].
        splits: the images and classes.
        index: int64 [N], position in the split of each row.
        notes: what a reader must know.
        facts: label -> value.
    """
    shown = splits.multi_hot[index.numpy()]
    precisions = average_precisions(logits.numpy(), shown)
    mean = float(np.nanmean(precisions))
    absent = int(np.isnan(precisions).sum())
    notes = [*notes, *([f"{absent} class(es) have no image and no part in the mean."] if absent else [])]
    expectations = recipe.expected.compare(recipe.model.name, {"mean_average_precision": mean})
    run.write_text("average_precision.csv", precision_table(splits.classes, shown, precisions))
    content: dict[str, Any] = {
        "method": "probes.zeroshot",
        "classes": splits.classes,
        "images": len(logits),
        "measured": {"mean_average_precision": mean},
        "expectations": [{**vars(item), "verdict": item.verdict} for item in expectations],
        "notes": notes,
        "facts": dict(facts),
    }
    run.write_json("result.json", content)
    print(f"\nmean average precision {mean:.2f} over {len(precisions) - absent} classes, {len(logits)} images")
    for item in expectations:
        measured = "not measured" if item.measured is None else f"{item.measured:.2f}"
        print(f" expected  {item.name} {item.expected:.2f}, measured {measured}: {item.verdict}")
    for note in notes:
        print(f"     note  {note}")


def precision_table(classes: Sequence[str], shown: NDArray[np.bool_], precisions: NDArray[np.float64]) -> str:
    """One line a class: name, images that show it, average precision in percent (empty where none does)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["class", "images", "average_precision"])
    for name, count, value in zip(classes, shown.sum(axis=0), precisions, strict=True):
        writer.writerow([name, int(count), "" if np.isnan(value) else f"{value:.4f}"])
    return stream.getvalue()
