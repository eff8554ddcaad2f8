"""The end of a linear probe on images that show any number of classes, scored by average precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from probes.finish import save_head
from probes.multi_label import finish_multi_label
from probes.sections import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from probes.fit import Fitted
    from probes.module import LinearProbe
    from probes.runs import RunFolder
    from probes.sections import Recipe
    from probes.splits import Split, Splits


def check_multi_label_probe(recipe: Recipe) -> None:
    """Refuse what is about one class an image.

    Raises:
        RecipeError: seeds that draw by class, or a head of class texts, whose logits are no odds of a class.
    """
    if recipe.run.seeds:
        raise RecipeError("data.labels is 'multi' with run.seeds, which repeat draws by class; leave run.seeds out")
    if recipe.head.start == "zero_shot":
        raise RecipeError(
            "data.labels is 'multi' with head.start 'zero_shot', whose logits only rank classes of one image; use "
            "head.start=fresh"
        )


def finish_multi_label_probe(
    run: RunFolder, recipe: Recipe, splits: Splits, fitted: Fitted, reported: Split, duration: str
) -> None:
    """Write head, `average_precision.csv` and `result.json`, of the selected epoch or the last.

    Args:
        run: where to.
        recipe: the recipe.
        splits: data with `multi_hot`.
        fitted: the trained probe.
        reported: the split that is scored.
        duration: of the run, in words.
    """
    module = fitted.module
    module.load_reported_head()
    logits, index = predict_logits(module, fitted.loaders[reported.name])
    save_head(run, recipe, fitted.encoder, recipe.head.kind, module.head.state_dict(), splits.classes)
    if not run.writes:
        return
    assert reported.multi_hot is not None
    chosen = "the last epoch"
    if module.selected is not None:
        chosen = f"epoch {module.selected['epoch']}, by {module.selection_name}"
    finish_multi_label(
        run,
        logits,
        reported.multi_hot[index],
        splits.classes,
        method="probes.linear",
        compare=lambda measured: [],
        notes=splits.notes,
        facts={
            "encoder": recipe.model.name,
            "weights": fitted.encoder.loaded,
            "encoder sha256": fitted.encoder.sha256,
            "chosen": chosen,
            "duration": duration,
        },
    )


@torch.no_grad()
def predict_logits(
    module: LinearProbe, batches: Iterable[dict[str, Any]]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits [N, C] of every readable image, each once, and their positions in the split [N]."""
    module.eval()
    rows, index = [], []
    for batch in batches:
        if len(batch["target"]):
            moved = {key: batch[key].to(module.device) for key in ("features", "image") if key in batch}
            rows.append(module(moved).cpu())
            index.append(batch["index"])
    return torch.cat(rows).numpy(), torch.cat(index).numpy()
