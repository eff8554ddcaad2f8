"""One run of a method on stored features of images that show any number of classes, scored by average precision."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.sections import RecipeError

if TYPE_CHECKING:
    from probes.feature_run import Method, Samples, Scorer
    from probes.method_sections import MethodRecipe
    from probes.runs import RunFolder
    from probes.splits import Split, Splits
    from probes.store_table import FeatureTable


def check_repetitions(recipe: MethodRecipe) -> None:
    """Refuse what is drawn by class.

    Raises:
        RecipeError: seeds or shots were asked for.
    """
    if recipe.run.seeds or recipe.few_shot.shots:
        raise RecipeError(
            "data.labels is 'multi' with run.seeds or few_shot.shots, which repeat draws by class; leave both out"
        )


def execute_multi_label(
    recipe: MethodRecipe, method: Method, splits: Splits, reported: Split, run: RunFolder, start: float
) -> None:
    """Choose by mean average precision on the selection split, fit again, score once.

    Args:
        recipe: the recipe.
        method: a method that takes targets float [N, C].
        splits: data with `multi_hot`.
        reported: the split that is scored.
        run: where to.
        start: `time.monotonic()` at the beginning of the run.
    """
    from probes.extraction import load_tables
    from probes.multi_label import average_precisions, finish_multi_label
    from probes.results import candidates_csv

    tables = load_tables(recipe, splits)
    train = samples_of(tables, splits.train)
    candidates: list[dict[str, float]] = []
    value, chosen_by = method.fixed, "the recipe"
    selection = splits.selection
    if selection is not None:
        held = samples_of(tables, selection)
        for tried, scorer in method.path(train):
            precisions = average_precisions(_scores(scorer, held), held.targets.numpy() > 0)
            candidates.append({method.setting: tried, "mean_average_precision": float(np.nanmean(precisions))})
        value = max(candidates, key=lambda row: row["mean_average_precision"])[method.setting]
        chosen_by = selection.name
        if method.refit and selection.name == "holdout" and selection is not reported:
            train = train.joined(held)
    run.write_text("candidates.csv", candidates_csv(candidates))
    scored = samples_of(tables, reported)
    encoder = tables["train"].encoder
    facts: Mapping[str, Any] = {
        "encoder": recipe.model.name,
        "weights": encoder.loaded,
        "encoder sha256": encoder.sha256,
        "chosen": f"{method.setting} = {value:.6g}, by {chosen_by}",
        "duration": f"{time.monotonic() - start:.0f} s",
    }
    finish_multi_label(
        run,
        _scores(method.fit(train, value), scored),
        scored.targets.numpy() > 0,
        splits.classes,
        method=f"probes.{method.name}",
        compare=lambda measured: [],
        notes=splits.notes,
        facts=facts,
    )
    print(f"chosen: {facts['chosen']}")


def samples_of(tables: Mapping[str, FeatureTable], split: Split) -> Samples:
    """Features of a split with targets float32 [N, C] of 0 and 1."""
    import torch

    from probes.feature_run import Samples

    assert split.multi_hot is not None
    table = tables[split.name]
    shown = torch.from_numpy(split.multi_hot)[table.index].float()
    return Samples(split.name, table.features.float(), shown, shown.shape[1])


def _scores(scorer: Scorer, samples: Samples) -> Any:
    return scorer(samples.features).numpy()
