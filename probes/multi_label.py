"""Images that show several classes: average precision of each class, and the end of a run that measures it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from probes.results import Expectation
    from probes.runs import RunFolder


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
    scores: NDArray[np.float32],
    shown: NDArray[np.bool_],
    classes: Sequence[str],
    *,
    method: str,
    compare: Callable[[Mapping[str, float]], Sequence[Expectation]],
    notes: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    """Write `average_precision.csv` and, last, `result.json`; print the mean over the classes that occur.

    Args:
        run: where to.
        scores: [N, C], higher for more likely.
        shown: [N, C].
        classes: C names.
        method: the command.
        compare: from measured figures to them beside the recipe's expected ones.
        notes: what a reader must know.
        facts: label -> value.
    """
    precisions = average_precisions(scores, shown)
    mean = float(np.nanmean(precisions))
    absent = int(np.isnan(precisions).sum())
    notes = [*notes, *([f"{absent} class(es) have no image and no part in the mean."] if absent else [])]
    expectations = compare({"mean_average_precision": mean})
    run.write_text("average_precision.csv", precision_table(classes, shown, precisions))
    content: dict[str, Any] = {
        "method": method,
        "classes": list(classes),
        "images": len(scores),
        "measured": {"mean_average_precision": mean},
        "expectations": [{**vars(item), "verdict": item.verdict} for item in expectations],
        "notes": notes,
        "facts": dict(facts),
    }
    run.write_json("result.json", content)
    print(f"\nmean average precision {mean:.2f} over {len(precisions) - absent} classes, {len(scores)} images")
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
