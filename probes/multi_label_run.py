"""One run of a method on stored features of images that show any number of classes, scored by average precision."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes.draws import Repetition
from probes.sections import RecipeError

if TYPE_CHECKING:
    import torch

    from probes.feature_run import Method, Samples
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
    recipe: MethodRecipe, recipe_path: str, method: Method, splits: Splits, reported: Split, run: RunFolder, said: str
) -> None:
    """Choose by mean average precision on the selection split, fit again, score once.

    Args:
        recipe_path: names the run.
        method: a method that takes targets float [N, C].
        splits: data with `multi_hot`.
        reported: the split that is scored.
        run: where to.
        said: what `settle_precision` says of the precision.
    """
    start = time.monotonic()
    from probes.extraction import load_tables
    from probes.feature_run import LinearScorer, describe_skipped
    from probes.finish import save_head
    from probes.multi_label import PrecisionScore
    from probes.multi_label_finish import finish_multi_label
    from probes.results import RunResult, candidates_csv
    from probes.scoring import label_scores

    tables = load_tables(recipe, splits)
    train = samples_of(tables, splits.train)
    candidates: list[dict[str, float]] = []
    value, chosen_by, fitted = method.fixed, "schedule", [splits.train]
    selection = splits.selection
    if selection is not None:
        held = samples_of(tables, selection)
        candidates = score_settings(method, train, held, selection, tables[selection.name].index)
        value = max(candidates, key=lambda row: row["mean_average_precision"])[method.setting]
        chosen_by = selection.name
        if method.refit and Repetition(0, recipe.run.seed, splits, reported).may_refit:
            train, fitted = train.joined(held), [splits.train, selection]
    run.write_text("candidates.csv", candidates_csv(candidates))
    scorer, scored, encoder = method.fit(train, value), samples_of(tables, reported), tables["train"].encoder
    if isinstance(scorer, LinearScorer):
        state = {"0.weight": scorer.weight, "0.bias": scorer.bias}
        save_head(run, recipe, encoder, "linear", state, splits.classes, fitted)
    index, odds = tables[reported.name].index, method.name == "logistic"
    labels = label_scores(scorer(scored.features), index, reported, log_odds=odds)
    name, setting = "selected" if candidates else "last", f"{method.setting} = {value:.6g}"
    result = RunResult(
        title=f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}",
        method=f"probes.{method.name}",
        classes=splits.classes,
        split_sizes={name: len(split) for name, split in splits.named.items()},
        scores=[],
        notes=[*splits.notes, *describe_skipped(tables)],
        facts={
            "encoder": recipe.model.name,
            "weights": encoder.loaded,
            "encoder sha256": encoder.sha256,
            "precision": said,
            "duration": f"{time.monotonic() - start:.0f} s",
        },
    )
    score = PrecisionScore(name, reported.name, chosen_by, 0, labels.mean, None, len(index), setting)
    finish_multi_label(run, recipe, result, [score], labels)


def score_settings(
    method: Method, train: Samples, held: Samples, selection: Split, index: torch.Tensor
) -> list[dict[str, float]]:
    """Mean average precision of every setting on `held`, the images at positions `index` of the selection split.

    Raises:
        ValueError: scores are not finite.
    """
    from probes.finite import check_scores
    from probes.multi_label import average_precisions

    rows = []
    for tried, scorer in method.path(train):
        scores = scorer(held.features)
        check_scores(scores, index, selection)
        precisions = average_precisions(scores.numpy(), held.targets.numpy() > 0)
        rows.append({method.setting: tried, "mean_average_precision": float(np.nanmean(precisions))})
    return rows


def samples_of(tables: Mapping[str, FeatureTable], split: Split) -> Samples:
    """Features of a split with targets float32 [N, C] of 0 and 1."""
    import torch

    from probes.feature_run import Samples

    assert split.multi_hot is not None
    table = tables[split.name]
    shown = torch.from_numpy(split.multi_hot)[table.index].float()
    return Samples(split.name, table.features.float(), shown, shown.shape[1])
