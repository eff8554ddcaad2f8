"""`python -m probes.ridge RECIPE`: ridge regression of the classes on stored features, in closed form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from probes.cli import run_command
from probes.feature_run import LinearScorer, Samples, Scorer, execute_method, plan_method
from probes.method_sections import RidgeRecipe, RidgeSection

BLOCK_ROWS = 8192
"""Rows that are held in float64 at a time."""


class Ridge:
    """Minimises |X W - Y|^2 + penalty |W|^2 over centred features, with Y 1 for the class and 0 for the others.

    One eigendecomposition of the Gram matrix, in float64, serves all penalties. Penalties are relative: multiples of
    the mean eigenvalue.
    """

    name, setting = "ridge", "penalty"

    def __init__(self, section: RidgeSection) -> None:
        self.section = section
        self.fixed, self.refit = section.fixed, section.refit

    def path(self, train: Samples) -> Iterator[tuple[float, Scorer]]:
        """Largest penalty first."""
        solve = _decompose(train)
        for penalty in reversed(self.section.path):
            yield penalty, solve(penalty)

    def fit(self, train: Samples, value: float) -> Scorer:
        """One penalty."""
        return _decompose(train)(value)


def _decompose(train: Samples) -> Callable[[float], LinearScorer]:
    """Function from a relative penalty to the solution."""
    import torch
    from torch.nn import functional as F

    features, width = train.features, train.features.shape[1]
    mean = features.mean(dim=0, dtype=torch.float64)
    wanted = train.targets if train.targets.ndim == 2 else F.one_hot(train.targets, train.num_classes)  # [N, C]
    share = wanted.double().mean(dim=0)
    gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, len(share), dtype=torch.float64)
    for rows, targets in zip(torch.split(features, BLOCK_ROWS), torch.split(wanted, BLOCK_ROWS), strict=True):
        centred = rows.double() - mean
        gram.addmm_(centred.T, centred)
        cross.addmm_(centred.T, targets.double())
    values, vectors = torch.linalg.eigh(gram)  # [D], [D, D]
    turned = vectors.T @ cross
    unit = values.mean().clamp(min=1e-300)

    def solve(penalty: float) -> LinearScorer:
        weight = (vectors @ (turned / (values.clamp(min=0) + penalty * unit)[:, None])).T  # [C, D]
        return LinearScorer(weight.float(), (share - weight @ mean).float())

    return solve


def plan(recipe: RidgeRecipe) -> dict[str, Any]:
    """What `--plan` prints."""
    return plan_method(recipe, Ridge(recipe.ridge), recipe.ridge.path)


def execute(recipe: RidgeRecipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    execute_method(recipe, recipe_path, Ridge(recipe.ridge))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.ridge",
        "Solve ridge regression on the features of a frozen encoder in closed form.",
        schema=RidgeRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
