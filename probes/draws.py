"""Other draws from the same images: the hold-out of another seed, and a few images a class. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probes.sections import RecipeError
from probes.splits import Split, Splits, choose_holdout, describe

SHOTS_HOLDOUT = "shots_holdout"
"""Name of the split that is held out of a few-shot draw; "holdout" is that of all of train."""
SHOTS_STREAM = 0x5407
"""Second word of the seed of few-shot draws; see `probes.splits.HOLDOUT_STREAM`."""

AnyRecipe = TypeVar("AnyRecipe", bound=Any)
"""A recipe with the section `run`."""


@dataclass(frozen=True)
class Repetition:
    """What one repetition of a run is fitted, chosen and scored on."""

    shots: int
    """Images of each class; 0 for all of train."""
    seed: int
    drawn: Splits
    """Train, and the split to choose on."""
    reported: Split
    """What is scored: test, else this repetition's own selection split. Nothing is fitted on it."""

    @property
    def may_refit(self) -> bool:
        """Whether the selection split may join train once it has chosen: not where it is reported, nor a `val`."""
        held = self.drawn.selection
        return held is not None and is_held_out(self.drawn) and not shares_images(held, self.reported)

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split."""
        return {split.name: len(split) for split in [*self.drawn.named.values(), self.reported]}


def draw_repetition(recipe: Any, splits: Splits, shots: int, seed: int) -> Repetition:
    """The hold-out of a seed, and the few shots of it where some are asked for.

    A run of one seed keeps the hold-out of `data.holdout_seed`, which its splits come with. Without a test split the
    hold-out is what is reported, and shots are drawn from the rest of train.
    """
    base = with_seed(splits, recipe.data.holdout, seed) if recipe.run.seeds else splits
    reported = base.selection if base.test is None else base.test
    assert reported is not None, "a run with nothing to score on is refused before"
    return Repetition(shots, seed, with_shots(base, shots, seed) if shots else base, reported)


def draw_seeds(recipe: Any, splits: Splits) -> list[Repetition]:
    """The repetitions of `run.seeds` on all of train."""
    return [draw_repetition(recipe, splits, 0, seed) for seed in recipe.run.seeds]


def describe_draws(splits: Splits, repetitions: Sequence[Repetition]) -> dict[str, Any]:
    """What `data.json` holds: the data, and of every repetition its draw and what is reported of it."""
    rows = [
        {
            **({"shots": item.shots} if item.shots else {}),
            "seed": item.seed,
            "sizes": item.sizes,
            "reported": item.reported.name,
            "fingerprint": item.reported.fingerprint(),
        }
        for item in repetitions
    ]
    return {**describe(splits), **({"repetitions": rows} if rows else {})}


def shares_images(one: Split, other: Split) -> bool:
    """Whether some image of a source is in both."""
    return one.source is other.source and bool(np.isin(one.indices, other.indices).any())


def is_held_out(splits: Splits) -> bool:
    """Whether the selection split was carved from train."""
    return splits.selection is not None and splits.selection.source is splits.train.source


def whole_train(splits: Splits) -> Split:
    """Train with the hold-out that was carved from it, in the order of the source."""
    train, held = splits.train, splits.selection
    if held is None or not is_held_out(splits):
        return train
    indices = np.sort(np.concatenate([train.indices, held.indices]))
    targets = np.empty(len(indices), dtype=np.int64)
    for part in (train, held):
        targets[np.searchsorted(indices, part.indices)] = part.targets
    return Split("train", train.source, indices, targets)


def with_first_seed(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe of the first of `run.seeds`, which also draws the hold-out; itself where there are none.

    Raises:
        RecipeError: `data.holdout_seed` is given too.
    """
    if not recipe.run.seeds:
        return recipe
    if recipe.data.holdout_seed:
        raise RecipeError(
            f"data.holdout_seed is {recipe.data.holdout_seed} with run.seeds, each of which draws a hold-out of its "
            "own; leave data.holdout_seed out"
        )
    seed = recipe.run.seeds[0]
    run, data = dataclasses.replace(recipe.run, seed=seed), dataclasses.replace(recipe.data, holdout_seed=seed)
    return dataclasses.replace(recipe, run=run, data=data)


def with_seed(splits: Splits, share: float, seed: int) -> Splits:
    """The same data with the hold-out of another seed; a `val` stays what it is."""
    if not is_held_out(splits):
        return splits
    return carve(splits, whole_train(splits), share, seed)


def with_shots(splits: Splits, shots: int, seed: int) -> Splits:
    """Few images of each class of train, and a hold-out from among them; `val` is not looked at.

    Draws of one seed are nested: fewer shots are among the more. The hold-out takes a quarter, of two or three shots
    one, and there is none of one. Without a test split the hold-out of all of train is reported, and no shot is of it.

    Args:
        splits: the data, with all of train.
        shots: images of each class; classes with fewer give all they have.
        seed: of the draw and of the hold-out.
    """
    pool = splits.train if splits.test is None else whole_train(splits)
    drawn = pool.take("train", choose_shots(pool.targets, pool.keys, shots, seed))
    share = 0.25 if shots >= 4 else 1 / shots if shots > 1 else 0.0
    return carve(splits, drawn, share, seed, SHOTS_HOLDOUT)


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


def carve(splits: Splits, train: Split, share: float, seed: int, name: str = "holdout") -> Splits:
    """The data with this train split, less a hold-out from it that takes the place of any selection split."""
    held = choose_holdout(train.targets, train.keys, share, seed)
    selection = train.take(name, held) if held.any() else None
    return dataclasses.replace(splits, train=train.take("train", ~held), selection=selection)
