"""Recipes of the methods that fit stored features without a training loop. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from probes.sections import (
    DataSection,
    ExpectedSection,
    ModelSection,
    RecipeError,
    RunSection,
    Section,
    StoredFeaturesSection,
    setting,
)
from probes.zeroshot_sections import ComputeSection


@dataclass
class FewShotSection(Section):
    """Repeat with few images a class, drawn from train with every seed of `run.seeds`."""

    shots: list[int] = setting([])
    """Images of each class that are trained and chosen on; empty takes all of train. The hold-out comes out of them:
    a quarter, of two or three images one; with one image nothing is chosen and `fixed` settings are taken. Without
    a test split they are drawn outside of `data.holdout`, which is then reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(shots < 1 for shots in self.shots):
            raise RecipeError(f"shots is {self.shots}; expected whole numbers from 1 on")


@dataclass
class LogisticSection(Section):
    """Logistic regression: C times the summed cross-entropy, plus half the squared norm of the weights."""

    low: float = -6.0
    """log10 of the smallest C."""
    high: float = 5.0
    """log10 of the largest C."""
    count: int = setting(45, low=1)
    """Values of C, evenly spaced in the logarithm; the smallest alone where it is 1."""
    fixed: float = setting(1.0, low=0.0)
    """C where there is nothing to choose it on."""
    class_weights: str = setting("none", choices=("none", "auto"))
    """"auto" weighs samples by the inverse of their class's share of train."""
    refit: bool = True
    """Fit again with the chosen C on train and hold-out together."""
    tolerance: float = setting(1e-4, low=0.0)
    """Largest excess over the minimum of the objective, relative."""
    max_iterations: int = setting(100, low=1)
    """Steps of the solver at most, for each C."""
    solver: str = setting("newton", choices=("newton", "sklearn"))
    """"newton": truncated Newton, each C solved from the one before; "sklearn": scikit-learn's L-BFGS, as a
    reference, which needs more steps."""

    @property
    def path(self) -> list[float]:
        """The values of C, ascending."""
        step = (self.high - self.low) / max(self.count - 1, 1)
        return [math.pow(10, self.low + number * step) for number in range(self.count)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high < self.low:
            raise RecipeError(f"high is {self.high}, less than low ({self.low}); expected low <= high")


@dataclass
class KnnSection(Section):
    """Weighted nearest neighbours by cosine."""

    k: list[int] = setting([10, 20, 100, 200])
    """Numbers of neighbours to choose from."""
    temperature: float = setting(0.07, low=1e-6)
    """A neighbour votes exp(cosine / temperature) for its class."""
    fixed: int = setting(20, low=1)
    """Neighbours where there is nothing to choose them on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or min(self.k) < 1:
            raise RecipeError(f"k is {self.k}; expected one or more whole numbers from 1 on")


@dataclass
class RidgeSection(Section):
    """Ridge regression of the targets (1 for a class, 0 for the others), in closed form."""

    low: float = -6.0
    """log10 of the smallest penalty, relative to the mean variance of a feature times the number of samples."""
    high: float = 3.0
    """log10 of the largest penalty."""
    count: int = setting(28, low=1)
    """Penalties, evenly spaced in the logarithm."""
    fixed: float = setting(1e-2, low=0.0)
    """Relative penalty where there is nothing to choose it on."""
    refit: bool = True
    """Solve again with the chosen penalty on train and hold-out together."""

    @property
    def path(self) -> list[float]:
        """The relative penalties, ascending."""
        step = (self.high - self.low) / max(self.count - 1, 1)
        return [math.pow(10, self.low + number * step) for number in range(self.count)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high < self.low:
            raise RecipeError(f"high is {self.high}, less than low ({self.low}); expected low <= high")


@dataclass
class MethodRecipe:
    """What the recipes of all these methods have."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    features: StoredFeaturesSection = field(default_factory=StoredFeaturesSection)
    data: DataSection = field(default_factory=DataSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    few_shot: FewShotSection = field(default_factory=FewShotSection)
    expected: ExpectedSection = field(default_factory=ExpectedSection)


@dataclass
class LogisticRecipe(MethodRecipe):
    """`python -m probes.logistic`."""

    logistic: LogisticSection = field(default_factory=LogisticSection)


@dataclass
class KnnRecipe(MethodRecipe):
    """`python -m probes.knn`."""

    knn: KnnSection = field(default_factory=KnnSection)


@dataclass
class RidgeRecipe(MethodRecipe):
    """`python -m probes.ridge`."""

    ridge: RidgeSection = field(default_factory=RidgeSection)
