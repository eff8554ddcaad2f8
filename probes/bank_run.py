"""One run of a bank of heads, from recipe to report: trained at once, one chosen on the hold-out, test read once."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probes.bank_plan import bank_features, bank_kinds
from probes.bank_results import bank_csv, chosen_head, score_bank, summarise_bank
from probes.bank_start import Tables, build_fit, load_bank_tables
from probes.baselines import compute_baselines
from probes.checkpoints import Pace, write_checkpoint
from probes.draws import describe_draws, draw_seeds, with_first_seed, with_seed
from probes.encoder import recipe_spec
from probes.finish import finish_run, reported_split, save_head
from probes.fit import Fitted, build_data, check_machine
from probes.module import LinearProbe
from probes.plan import check_recipe
from probes.precision import settle_precision
from probes.runs import RunFolder
from probes.schedule import epoch_means
from probes.sections import Recipe, RecipeError
from probes.seen import note_seen_weights
from probes.splits import prepare_splits
from probes.trainer import find_checkpoint

if TYPE_CHECKING:
    from probes.bank_fit import BankFit
    from probes.results import Score
    from probes.splits import Splits


def execute_bank(recipe: Recipe, recipe_path: str) -> None:
    """One run, from recipe to report.

    Raises:
        RecipeError: the recipe does not fit the data or the machine, or nothing is held out to choose a head by.
        ValueError: every head diverged.
    """
    start = time.monotonic()
    asked, precision = settle_precision(recipe)
    recipe = with_first_seed(asked)
    check_recipe(recipe)
    splits = prepare_splits(recipe.data)
    if splits.selection is None:
        raise RecipeError(
            "a bank needs images to choose a head by and there are none; set data.holdout=0.15 (of train), or give "
            "data.val"
        )
    note_seen_weights(recipe.model.weights, splits)
    reported = reported_split(splits, "the head and the epoch", recipe.run.seeds)
    check_recipe(recipe, len(splits.train))
    check_machine(recipe)
    for kind in bank_kinds(recipe):
        bank_features(recipe, kind).feature_dim(recipe_spec(recipe))  # refuses more blocks than there are
    run = RunFolder.create(asked, recipe_path)
    run.record_data(describe_draws(splits, draw_seeds(recipe, splits)))
    print(f"run folder: {run.path}", *splits.notes, sep="\nnote: ", flush=True)

    tables = load_bank_tables(recipe, splits)
    fit = build_fit(recipe, splits, tables)
    train_bank(fit, run, encoder_sha256=next(iter(tables.values()))["train"].encoder.sha256)
    run.write_text("bank.csv", bank_csv(fit))
    predictions, scores = score_bank(fit, {kind: of[reported.name] for kind, of in tables.items()}, reported)
    fitted = fit_chosen(recipe, splits, fit, tables)
    chosen = chosen_recipe(recipe, fit)
    state = fitted.module.head.state_dict()
    save_head(run, chosen, fitted.encoder, recipe.head.kind, state, splits.classes, [splits.train])
    result = summarise_bank(recipe, Path(recipe_path), splits, fit, tables, scores)
    result.repeats.extend(repeat_seeds(recipe, splits, tables, result.reported))
    baselines, left_out = compute_baselines(chosen, splits, fitted, reported)
    result.baselines.extend(baselines)
    result.notes.extend(left_out)
    result.facts["precision"] = precision
    result.facts["duration"] = f"{time.monotonic() - start:.0f} s"
    finish_run(run, recipe, result, predictions, reported)


def repeat_seeds(recipe: Recipe, splits: Splits, tables: Tables, first: Score) -> list[dict[str, Any]]:
    """Rows of `run.seeds`: the first is the run's own, the others' banks are trained here on the same extraction.

    Raises:
        ValueError: every head of a seed diverged.
    """
    if len(recipe.run.seeds) < 2:
        return []
    rows = [{"seed": recipe.run.seeds[0], "top1": first.top1, "chosen": first.setting}]
    for seed in recipe.run.seeds[1:]:
        drawn = with_seed(splits, recipe.data.holdout, seed)
        taken = {
            kind: {name: of[name].whole.take(split) for name, split in drawn.named.items()}
            for kind, of in tables.items()
        }
        fit = build_fit(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=seed)), drawn, taken)
        while fit.epoch < fit.epochs:
            fit.run_epoch()
            log_row(fit)
        reported = drawn.named[first.split]
        score = score_bank(fit, {kind: of[first.split] for kind, of in taken.items()}, reported)[1][0]
        rows.append({"seed": seed, "top1": score.top1, "chosen": score.setting})
        print(f"seed {seed}: top-1 {score.top1:.2f}, {score.setting}", flush=True)
    return rows


def train_bank(fit: BankFit, run: RunFolder, *, encoder_sha256: str) -> None:
    """Train what remains; an epoch ends with a row of `log.txt`, a printed line and, at a `Pace`, a checkpoint.

    Raises:
        ValueError: every head diverged, or the checkpoint of the run belongs to another bank or encoder.
    """
    checkpoint, passed = find_checkpoint(run)
    for note in passed:
        print(f"note: {note}", flush=True)
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["encoder_sha256"] != encoder_sha256:
            raise ValueError(
                f"the checkpoint's heads belong to encoder {state['encoder_sha256'][:12]}, this run's is "
                f"{encoder_sha256[:12]}; restore the weights it was started with, or start a new run"
            )
        fit.load_state_dict(state["fit"])
    pace, last_line = Pace(), 0.0
    while fit.epoch < fit.epochs:
        fit.run_epoch()
        row = log_row(fit)
        run.append_log(row)  # first: a repeated epoch keeps its row, and an epoch without one would never be repeated
        began = time.monotonic()
        if pace.due() or fit.epoch == fit.epochs:
            state = {"fit": fit.state_dict(), "encoder_sha256": encoder_sha256}
            write_checkpoint(run.path / "checkpoints", fit.epoch * fit.steps, 2, functools.partial(torch.save, state))
            pace.saved(began)
        if time.monotonic() - last_line >= 2 or fit.epoch == fit.epochs:
            last_line = time.monotonic()
            best = fit.bank.heads[int(row["head"])].name
            lost = f", {row['diverged']:.0f} diverged" if row["diverged"] else ""
            print(
                f"epoch {row['epoch']:.0f}/{fit.epochs - 1}: best of {len(fit.bank.heads)} heads {best}: loss "
                f"{row['train_loss']:.4f}, top-1 {fit.selection.name} {row[f'{fit.selection.name}_acc1']:.2f}{lost}",
                flush=True,
            )


def log_row(fit: BankFit) -> dict[str, float]:
    """The row of `log.txt` of the epoch just trained: of the head that is best on the selection split in it.

    Raises:
        ValueError: every head diverged.
    """
    best = fit.best_of_epoch(fit.epoch - 1)
    if best is None:
        raise ValueError(
            f"every head of the bank has a loss that is not finite in epoch {fit.epoch - 1}; set lower bank.lrs"
        )
    head = fit.bank.heads[best["head"]]
    rate = head.lr * epoch_means(fit.schedule, fit.epochs)[best["epoch"]]
    return {
        "train_lr": rate,
        "train_min_lr": rate,
        "train_loss": best["train_loss"],
        f"{fit.selection.name}_loss": best["selection_loss"],
        f"{fit.selection.name}_acc1": best["selection_acc1"],
        "epoch": best["epoch"],
        "n_parameters": fit.bank.num_classes * (fit.bank.feature_dims[head.features] + 1),
        "head": best["head"],
        "diverged": int(fit.bank.diverged.sum()),
    }


def chosen_recipe(recipe: Recipe, fit: BankFit) -> Recipe:
    """The recipe of the chosen head alone."""
    head = chosen_head(fit)
    optimizer = dataclasses.replace(recipe.optimizer, lr=head.lr, weight_decay=head.weight_decay)
    return dataclasses.replace(
        recipe,
        features=dataclasses.replace(recipe.features, pool=head.features),
        optimizer=optimizer,
        bank=dataclasses.replace(recipe.bank, lrs=[], weight_decays=[], kinds=[]),
    )


def fit_chosen(recipe: Recipe, splits: Splits, fit: BankFit, tables: Tables) -> Fitted:
    """The chosen head as the probe that it would be alone."""
    table = tables[chosen_head(fit).features]
    module = LinearProbe(
        fit.build_selected(),
        optimizer=chosen_recipe(recipe, fit).optimizer,
        schedule=fit.schedule,
        num_classes=len(splits.classes),
        evaluation_names=[name for name in table if name != "train"],
        encoder_sha256=table["train"].encoder.sha256,
    )
    return Fitted(module, table["train"].encoder, build_data(recipe, splits, recipe_spec(recipe)), table)
