"""What a trained bank of heads gives: its scores on the reported split, a table of all heads, and the run's result."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from probes.bank_fit import FeatureSplit, evaluate_bank
from probes.finite import best_row
from probes.results import Predictions, RunResult, Score, compare_expected
from probes.zeroshot import score_logits

if TYPE_CHECKING:
    from probes.bank import BankHead
    from probes.bank_fit import BankFit
    from probes.bank_start import Tables
    from probes.sections import Recipe
    from probes.splits import Split, Splits
    from probes.store_table import FeatureTable


def chosen_head(fit: BankFit) -> BankHead:
    """The head that the selection split chose."""
    assert fit.selected is not None, "a fit of which every head diverged has ended with an error"
    number: int = fit.selected["head"]
    return fit.bank.heads[number]


@torch.no_grad()
def score_bank(fit: BankFit, tables: Mapping[str, FeatureTable], reported: Split) -> tuple[Predictions, list[Score]]:
    """Read the reported split, which has no part in any choice, once at the end.

    Args:
        fit: finished.
        tables: the split's features by kind.
        reported: the split.

    Returns:
        Predictions of the chosen head, and three scores: "selected", the head and epoch that the selection split chose;
        "last", the head that it chose at the end; and "best", an oracle: the highest of all heads at the end and of the
        selected one.
    """
    assert fit.selected is not None
    final, selection = fit.epochs - 1, fit.selection.name
    last = fit.best_of_epoch(final)
    assert last is not None
    index = next(iter(tables.values())).index

    def score(name: str, chosen_by: str, head: int, epoch: int) -> tuple[Predictions, Score]:
        single = fit.build_selected() if name == "selected" else fit.bank.build_single(head)
        described = fit.bank.heads[head]
        predictions, found = score_logits(single(tables[described.features].features.float()), index, reported)
        setting = f"{described.name}, epoch {epoch}"
        return predictions, dataclasses.replace(found, name=name, chosen_by=chosen_by, epoch=epoch, setting=setting)

    predictions, selected = score("selected", selection, fit.selected["head"], fit.selected["epoch"])
    features = {kind: table.features for kind, table in tables.items()}
    rows = evaluate_bank(fit.bank, FeatureSplit(features, next(iter(tables.values())).targets, reported.name))
    highest = int(best_row([{**rows[head], "head": head} for head in fit.alive], "acc1")["head"])
    best = score("best", reported.name, highest, final)[1]
    if selected.top1 > best.top1:
        best = dataclasses.replace(selected, name="best", chosen_by=reported.name)
    return predictions, [selected, score("last", selection, last["head"], final)[1], best]


def bank_csv(fit: BankFit) -> str:
    """A line a head: its setting, its best epoch on the selection split, and its scores there and at the end."""
    stream, split = io.StringIO(), fit.selection.name
    writer = csv.writer(stream, lineterminator="\n")
    scores = [f"{when}_{split}_{key}" for when in ("best", "last") for key in ("acc1", "loss")]
    writer.writerow(["head", "features", "kind", "lr", "weight_decay", "best_epoch", *scores, "diverged"])
    for number, head in enumerate(fit.bank.heads):
        rows = [row for row in fit.history if row["head"] == number]
        last, best = rows[-1], max(rows, key=fit.merit)
        found = [row[f"selection_{key}"] for row in (best, last) for key in ("acc1", "loss")]
        setting = [number, head.features, head.kind, head.lr, head.weight_decay]
        writer.writerow([*setting, best["epoch"], *found, int(last["diverged"])])
    return stream.getvalue()


def summarise_bank(
    recipe: Recipe, recipe_path: Path, splits: Splits, fit: BankFit, tables: Tables, scores: list[Score]
) -> RunResult:
    """Scores, expectations, notes and facts of a finished bank."""
    chosen, heads = chosen_head(fit), fit.bank.heads
    of_chosen = tables[chosen.features]
    facts = of_chosen["train"].encoder
    skipped = [
        f"{len(table.skipped)} unreadable image(s) of {name} were left out, the first {min(table.skipped)}."
        for name, table in of_chosen.items()
        if table.skipped
    ]
    return RunResult(
        title=f"{recipe_path.resolve().parent.name}/{recipe_path.stem}",
        method="probes.linear",
        classes=splits.classes,
        split_sizes={name: len(split) for name, split in splits.named.items()},
        scores=scores,
        expectations=compare_expected(recipe.expected, scores),
        notes=[*splits.notes, *skipped, *describe_grid(fit)],
        facts={
            "encoder": recipe.model.name,
            "weights": facts.loaded,
            "encoder sha256": facts.sha256,
            "features": f"{chosen.features}, {facts.feature_dim}-d, cached",
            "image size": f"{facts.image_size} px",
            "heads": f"{len(heads)}, trained at once",
            "chosen head": chosen.name,
            "trainable parameters": f"{len(splits.classes) * (facts.feature_dim + 1):,}",
        },
    )


def describe_grid(fit: BankFit) -> list[str]:
    """What a reader must know of the grid: heads that diverged, and a choice at its edge."""
    heads, chosen = fit.bank.heads, chosen_head(fit)
    notes = []
    lost = [head.name for number, head in enumerate(heads) if number not in fit.alive]
    if lost:
        notes.append(f"{len(lost)} of {len(heads)} heads diverged and could not be chosen, the first {lost[0]}.")
    rates = sorted({head.lr for head in heads})
    if len(rates) > 1 and chosen.lr in (rates[0], rates[-1]):
        edge, other = ("highest", "higher") if chosen.lr == rates[-1] else ("lowest", "lower")
        notes.append(f"The chosen learning rate {chosen.lr:g} is the {edge} of the grid; a {other} one may do better.")
    return notes
