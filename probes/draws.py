"""Other draws from the same images: the hold-out of another seed, and a few images a class. No torch."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from probes.sections import Recipe
from probes.splits import Split, Splits, choose_holdout

SHOTS_STREAM = 0x5407
"""Second word of the seed of few-shot draws; see `probes.splits.HOLDOUT_STREAM`."""


def whole_train(splits: Splits) -> Split:
    """Train with the hold-out that was carved from it, in the order of the source."""
    train, held = splits.train, splits.selection
    if held is None or held.name != "holdout":
        return train
    indices = np.sort(np.concatenate([train.indices, held.indices]))
    targets = np.empty(len(indices), dtype=np.int64)
    for part in (train, held):
        targets[np.searchsorted(indices, part.indices)] = part.targets
    return Split("train", train.source, indices, targets)


def with_first_seed(recipe: Recipe) -> Recipe:
    """The recipe of the first of `run.seeds`; itself where there are none."""
    if not recipe.run.seeds:
        return recipe
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=recipe.run.seeds[0]))


def with_seed(splits: Splits, share: float, seed: int) -> Splits:
    """The same data with the hold-out of another seed; a `val` stays what it is."""
    if splits.selection is None or splits.selection.name != "holdout":
        return splits
    return carve(splits, whole_train(splits), share, seed)


def with_shots(splits: Splits, shots: int, seed: int) -> Splits:
    """Few images of each class of train, and a hold-out from among them; `val` is not looked at.

    Draws of one seed are nested: fewer shots are among the more. The hold-out takes a quarter, of two or three shots
    one, and there is none of one.

    Args:
        splits: the data, with all of train.
        shots: images of each class; classes with fewer give all they have.
        seed: of the draw and of the hold-out.
    """
    pool = whole_train(splits)
    drawn = pool.take("train", choose_shots(pool.targets, pool.keys, shots, seed))
    share = 0.25 if shots >= 4 else 1 / shots if shots > 1 else 0.0
    return carve(splits, drawn, share, seed)


def choose_shots(targets: NDArray[np.int64], keys: list[str], shots: int, seed: int) -> NDArray[np.bool_]:
    """Which samples a few-shot draw takes: `shots` of each class, or all of a smaller one.

    Args:
        targets: [N] class index of each sample.
        keys: N names; the draw depends on them and not on the samples' order.
        shots: at least 1.
        seed: of a generator of its own, one stream per class.

    Returns:
        bool [N].
    """
    drawn = np.zeros(len(targets), dtype=np.bool_)
    names = np.array(keys, dtype=object)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        members = members[np.argsort(names[members])]
        generator = np.random.default_rng([seed, SHOTS_STREAM, int(target)])
        drawn[generator.permutation(members)[:shots]] = True
    return drawn


def carve(splits: Splits, train: Split, share: float, seed: int) -> Splits:
    """The data with this train split, less a hold-out from it that takes the place of any selection split."""
    held = choose_holdout(train.targets, train.keys, share, seed)
    selection = train.take("holdout", held) if held.any() else None
    return dataclasses.replace(splits, train=train.take("train", ~held), selection=selection)
