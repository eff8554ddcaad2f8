"""`python -m probes.ncm RECIPE`: classes by their nearest mean, or linear discriminant analysis, in closed form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from probes.cli import run_command
from probes.feature_run import LinearScorer, Samples, Scorer, execute_method, plan_method
from probes.method_sections import MethodRecipe
from probes.sections import RecipeError, Section, setting

BLOCK_ROWS = 8192  # held in float64 at a time


@dataclass
class NcmSection(Section):
    """Distance to the mean of each class, in the metric of the covariance S within classes."""

    covariance: str = setting("shared", choices=("shared", "none"))
    """"shared": (1 - shrinkage) S + shrinkage trace(S)/D I, linear discriminant analysis; "none": Euclidean."""
    shrinkage: list[float] = setting([1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 0.0001])
    """Values to choose from, for a shared covariance: from 0, S as it is, to 1, its mean variance alone."""
    fixed: float = setting(0.1, low=0.0, high=1.0)
    """Shrinkage where there is nothing to choose it on."""
    priors: str = setting("auto", choices=("auto", "uniform"))
    """Weights of the classes, also in S: "auto", their shares of train (all alike without S); "uniform", all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shrinkage or not all(0 <= value <= 1 for value in self.shrinkage):
            raise RecipeError(f"shrinkage is {self.shrinkage}; expected one or more numbers from 0 to 1")


@dataclass
class NcmRecipe(MethodRecipe):
    """`python -m probes.ncm`; refuses several labels an image, which belong to no one mean."""

    ncm: NcmSection = field(default_factory=NcmSection)

    def __post_init__(self) -> None:
        if self.data.labels == "multi":
            raise RecipeError("data.labels is 'multi', but means need one class an image; use single or probes.ridge")


class ClassMeans:
    """Gaussian classes of one covariance, whose eigendecomposition, in float64, serves every shrinkage.

    Directions without variance take no part; where no class varies at all (one image each), all take the same part.
    """

    name, setting, refit = "ncm", "shrinkage", True

    def __init__(self, section: NcmSection) -> None:
        self.section, shared = section, section.covariance == "shared"
        self.values = sorted(set(section.shrinkage), reverse=True) if shared else [1.0]
        self.fixed = section.fixed if shared else 1.0

    def path(self, train: Samples) -> Iterator[tuple[float, Scorer]]:
        """Largest shrinkage first."""
        solve = _decompose(train, self.section)
        yield from ((value, solve(value)) for value in self.values)

    def fit(self, train: Samples, value: float) -> Scorer:
        """One shrinkage."""
        return _decompose(train, self.section)(value)


def _decompose(train: Samples, section: NcmSection) -> Callable[[float], LinearScorer]:
    """Function from a shrinkage to each class's logarithm of its probability, less a part that all have in common."""
    import torch

    shared, width = section.covariance == "shared", train.features.shape[1]
    counts = train.targets.bincount(minlength=train.num_classes).double()
    present, sizes = counts > 0, counts.clamp(min=1)
    priors = counts / counts.sum() if shared and section.priors == "auto" else present.double() / present.sum()
    blocks = [*zip(torch.split(train.features, BLOCK_ROWS), torch.split(train.targets, BLOCK_ROWS), strict=True)]
    means, covariance = torch.zeros(len(counts), width).double(), torch.zeros(width, width).double()
    for rows, targets in blocks:
        means.index_add_(0, targets, rows.double())
    means /= sizes[:, None]
    for rows, targets in blocks if shared else []:
        apart = (rows.double() - means[targets]) * (priors / sizes).sqrt()[targets, None]
        covariance.addmm_(apart.T, apart)
    values, vectors = torch.linalg.eigh(covariance if covariance.any() else torch.eye(width).double())  # [D], [D, D]
    centre = priors @ means
    turned = (means - centre) * present[:, None] @ vectors  # [C, D]

    def solve(shrinkage: float) -> LinearScorer:
        spread = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
        scaled = torch.where(spread > width * torch.finfo(spread.dtype).eps * spread.max(), turned / spread, 0.0)
        constant = priors.log() - (scaled * turned).sum(dim=1) / 2
        # Without images a class never wins: over the priors scores average to constants, so the best is not below all.
        constant[~present] = constant[present].min() - 100
        weight = scaled @ vectors.T
        return LinearScorer(weight.float(), (constant - weight @ centre).float())

    return solve


def plan(recipe: NcmRecipe) -> dict[str, Any]:
    """What `--plan` prints."""
    return plan_method(recipe, ClassMeans(recipe.ncm), ClassMeans(recipe.ncm).values)


def execute(recipe: NcmRecipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    execute_method(recipe, recipe_path, ClassMeans(recipe.ncm))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    about = "Classify images by the nearest class mean of the features of a frozen encoder, in closed form."
    return run_command("python -m probes.ncm", about, schema=NcmRecipe, plan=plan, execute=execute, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
