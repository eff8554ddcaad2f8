"""Penalised logistic regression over a path of regularisation strengths, each solved from the one before.

The objective is scikit-learn's: C * sum_i w_i loss(x_i, y_i) + |W|^2 / 2, biases without penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from probes.newton import Objective, minimise
from probes.principal_axes import check_finite_rows, find_principal_axes
from probes.regression_losses import LOSSES, Loss

ABSENT_BIAS = 100.0
"""Bias, down or up, of a class that no sample, or every sample, shows: its best one is infinite."""
FLOAT64_ELEMENTS = 2**23
"""Feature matrices up to this size (64 MiB) are solved in float64; larger ones in float32, with sums in float64."""


@dataclass(frozen=True)
class PathPoint:
    """The solution for one strength."""

    c: float
    """Inverse regularisation strength."""
    weight: torch.Tensor
    """float32 [C, D]."""
    bias: torch.Tensor
    """float32 [C]."""
    objective: float
    gradient_norm: float
    """Euclidean norm of the gradient by the penalised weights."""
    iterations: int
    """Newton steps."""
    converged: bool
    """Whether the certified excess over the minimum (over weights and biases) is within the tolerance."""


def fit_path(
    features: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    cs: Sequence[float],
    *,
    loss: str = "softmax",
    sample_weights: torch.Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> Iterator[PathPoint]:
    """Solutions for every C, in the order given; ascending ones are fastest.

    Features are centred and turned onto their principal axes first, which leaves the problem the same and makes the
    Hessian's diagonal a good preconditioner.

    Args:
        features: [N, D], any floating type.
        targets: class indices int64 [N], or 0 and 1 [N, C] for the loss "bce".
        num_classes: C.
        cs: inverse regularisation strengths, above 0.
        loss: "softmax", or "bce": each class against the rest.
        sample_weights: [N], or None for ones.
        tolerance: largest certified excess over the minimum, relative to the objective and to what the weights gain.
        max_iterations: Newton steps at most, for each C.

    Raises:
        ValueError: features that are not finite, a C that is not above 0, or no samples.
    """
    if not len(features):
        raise ValueError("there are no samples to fit; expected at least one row of features")
    if not all(0 < c < float("inf") for c in cs):
        raise ValueError(f"C is {min(cs)}; expected finite numbers above 0")
    check_finite_rows(features)
    axes = find_principal_axes(features)
    dtype = torch.float64 if features.numel() <= FLOAT64_ELEMENTS else torch.float32
    rotated = axes.rotate(features.to(dtype))
    columns = torch.cat([rotated, rotated.new_ones(len(rotated), 1)], dim=1)  # [N, R]
    weights = None if sample_weights is None else sample_weights.to(columns)[:, None]
    kept, wanted = _solvable_classes(targets, num_classes, loss, columns)
    objective = Objective(columns, wanted, weights, LOSSES[loss])
    start, constant_loss = _best_constant(objective, LOSSES[loss], len(kept))
    for c in cs:
        point = objective.evaluate(start, c)
        found = minimise(
            objective, point, c, constant=c * constant_loss, tolerance=tolerance, max_iterations=max_iterations
        )
        start = found.weights
        weight, bias = axes.to_features(found.weights[:-1], found.weights[-1])
        whole = torch.zeros(num_classes, features.shape[1], device=features.device)
        biases = _absent_biases(targets, num_classes, loss).to(features.device)
        whole[kept], biases[kept] = weight.float(), bias.float()
        yield PathPoint(c, whole, biases, found.value, found.gradient_norm, found.iterations, found.converged)


def _solvable_classes(
    targets: torch.Tensor, num_classes: int, loss: str, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes with a finite solution, int64 [K], and the targets among them."""
    kept = (_absent_biases(targets, num_classes, loss) == 0).nonzero().flatten()
    targets = targets.to(columns.device)
    if loss == "bce":
        return kept, targets[:, kept].to(columns)
    position = torch.full((num_classes,), -1, device=targets.device)
    position[kept] = torch.arange(len(kept), device=targets.device)
    return kept, position[targets]


def _absent_biases(targets: torch.Tensor, num_classes: int, loss: str) -> torch.Tensor:
    """0 for classes that are solved, else the bias that stands for infinity; float32 [C]."""
    if loss == "bce":
        totals = targets.sum(dim=0).cpu()
        full = totals == len(targets)
    else:
        totals = torch.bincount(targets.cpu(), minlength=num_classes)
        full = torch.zeros(num_classes, dtype=torch.bool)
    return ABSENT_BIAS * (full.float() - (totals == 0).float())


def _best_constant(objective: Objective, loss: Loss, classes: int) -> tuple[torch.Tensor, float]:
    """Weights [R, K] that are 0 but for the best biases, and their summed loss."""
    start = objective.columns.new_zeros(objective.columns.shape[1], classes)
    start[-1] = loss.constant_logits(objective.class_totals(classes), objective.total_weight)
    return start, objective.evaluate(start, 1.0).value
