"""`python -m probes.logistic RECIPE`: logistic regression on stored features, its C chosen on the hold-out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probes.cli import run_command
from probes.feature_run import LinearScorer, Samples, Scorer, execute_method, plan_method
from probes.method_sections import LogisticRecipe, LogisticSection

if TYPE_CHECKING:
    import torch


class Logistic:
    """Softmax regression over a path of C, strongest regularisation first."""

    name, setting = "logistic", "C"

    def __init__(self, section: LogisticSection) -> None:
        self.section = section
        self.fixed, self.refit = section.fixed, section.refit

    def path(self, train: Samples) -> Iterator[tuple[float, Scorer]]:
        """Every C of the recipe, each solved from the one before."""
        return self._solve(train, self.section.path)

    def fit(self, train: Samples, value: float) -> Scorer:
        """One C."""
        return next(self._solve(train, [value]))[1]

    def _solve(self, train: Samples, cs: Sequence[float]) -> Iterator[tuple[float, Scorer]]:
        several = train.targets.ndim == 2
        if several and (self.section.solver == "sklearn" or self.section.class_weights != "none"):
            raise ValueError(
                "images of several classes are fitted by logistic.solver=newton without class weights; set "
                "logistic.solver=newton and logistic.class_weights=none"
            )
        weights = self._sample_weights(train.targets, train.num_classes)
        if self.section.solver == "sklearn":
            yield from self._solve_by_sklearn(train, cs, weights)
            return
        from probes.softmax_path import fit_path

        section, unsolved = self.section, []
        for point in fit_path(
            train.features,
            train.targets,
            train.num_classes,
            cs,
            loss="bce" if several else "softmax",
            sample_weights=weights,
            tolerance=section.tolerance,
            max_iterations=section.max_iterations,
        ):
            if not point.converged:
                unsolved.append(f"{point.c:.3g}")
            yield point.c, LinearScorer(point.weight, point.bias)
        if unsolved:
            print(
                f"note: not within logistic.tolerance {section.tolerance:g} of the minimum after "
                f"{section.max_iterations} steps, or at the limit of rounding: C = {', '.join(unsolved)}"
            )

    def _solve_by_sklearn(
        self, train: Samples, cs: Sequence[float], weights: torch.Tensor | None
    ) -> Iterator[tuple[float, Scorer]]:
        import torch
        from sklearn.linear_model import LogisticRegression

        features, targets = train.features.double().numpy(), train.targets.numpy()
        of_sample = None if weights is None else weights.double().numpy()
        for c in cs:
            model = LogisticRegression(C=c, tol=self.section.tolerance, max_iter=self.section.max_iterations)
            model.fit(features, targets, sample_weight=of_sample)
            coefficients, intercepts = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
            if len(model.classes_) == 2:  # one row: the second class against the first
                coefficients = torch.cat([-coefficients, coefficients]) / 2
                intercepts = torch.cat([-intercepts, intercepts]) / 2
            weight = torch.zeros(train.num_classes, features.shape[1])
            bias = torch.full((train.num_classes,), float(intercepts.min()) - 100)  # of classes without a sample
            weight[model.classes_], bias[model.classes_] = coefficients, intercepts
            yield c, LinearScorer(weight, bias)

    def _sample_weights(self, targets: torch.Tensor, num_classes: int) -> torch.Tensor | None:
        if self.section.class_weights == "none":
            return None
        from probes.class_weights import balanced_weights

        return balanced_weights(targets.bincount(minlength=num_classes))[targets]


def plan(recipe: LogisticRecipe) -> dict[str, Any]:
    """What `--plan` prints."""
    return plan_method(recipe, Logistic(recipe.logistic), recipe.logistic.path)


def execute(recipe: LogisticRecipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    execute_method(recipe, recipe_path, Logistic(recipe.logistic))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.logistic",
        "Fit logistic regression to the features of a frozen encoder; C is chosen on the hold-out.",
        schema=LogisticRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
