"""A recipe's bank of heads at the start of its training: stored features of every kind, and the heads on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from probes.bank import HeadBank, build_grid
from probes.bank_fit import BankFit, FeatureSplit
from probes.bank_plan import bank_features, bank_kinds
from probes.extraction import extraction_device, load_tables
from probes.head_start import recipe_class_weights, start_head

if TYPE_CHECKING:
    from probes.sections import Recipe
    from probes.splits import Splits
    from probes.store_table import FeatureTable

Tables = Mapping[str, Mapping[str, "FeatureTable"]]
"""Stored features by kind, then by split; of one split all hold the same samples."""


def load_bank_tables(recipe: Recipe, splits: Splits) -> dict[str, dict[str, FeatureTable]]:
    """Features of every kind of the bank and every split, extracted in one pass.

    Raises:
        ValueError: other images could be read for one kind than for another; and see `load_tables`.
    """
    parts = [part for kind in bank_kinds(recipe) for part in bank_features(recipe, kind).kinds]
    stored = dict.fromkeys([*parts, *recipe.features.kinds])  # the first kind's pass stores what all of them need
    tables = {}
    for kind in bank_kinds(recipe):
        one = dataclasses.replace(recipe, features=dataclasses.replace(recipe.features, pool=kind, kinds=list(stored)))
        tables[kind] = load_tables(one, splits, views=recipe.features.views)
    first = next(iter(tables.values()))
    for kind, of_kind in tables.items():
        for name, table in of_kind.items():
            if not torch.equal(table.index, first[name].index):
                raise ValueError(
                    f"the stored features of {name} hold other images for {kind} than for {next(iter(tables))}: some "
                    f"could be read when one was made and not when the other was; delete {recipe.features.cache}"
                )
    return tables


def build_fit(recipe: Recipe, splits: Splits, tables: Tables) -> BankFit:
    """The bank of a recipe at the start of its training."""
    section, optimizer = recipe.bank, recipe.optimizer
    assert splits.selection is not None
    decays = section.weight_decays or [optimizer.weight_decay]
    dims = {kind: of_kind["train"].encoder.feature_dim for kind, of_kind in tables.items()}
    initial: dict[str, torch.Tensor] = {}
    for kind, dim in dims.items() if recipe.head.start == "zero_shot" else ():
        linear = start_head(recipe, splits.classes, dim)[-1]
        assert isinstance(linear, nn.Linear)
        initial[kind] = linear.weight.detach()
    bank = HeadBank(
        build_grid(tables, map(float, section.lrs), map(float, decays), recipe.head.kind),
        dims,
        len(splits.classes),
        optimizer=optimizer.name,
        momentum=optimizer.momentum,
        class_weights=recipe_class_weights(recipe, splits),
        initial=initial,
        seed=recipe.run.seed,
    )
    return BankFit(
        bank.to(extraction_device()),
        [_take(tables, "train", view) for view in range(recipe.features.views or 1)],
        _take(tables, splits.selection.name),
        epochs=recipe.schedule.epochs,
        batch=recipe.trainer.global_batch,
        warmup_epochs=recipe.schedule.warmup_epochs,
        seed=recipe.run.seed,
    )


def _take(tables: Tables, split: str, view: int = 0) -> FeatureSplit:
    first = next(iter(tables.values()))[split]
    return FeatureSplit({kind: of_kind[split].view(view) for kind, of_kind in tables.items()}, first.targets, split)
