"""How far a penalised linear model is from its minimum at most, free biases included: a duality gap.

Shapes: N samples, R columns of which the last is the constant 1 of the bias, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probes.newton import Objective, Point

BIAS_STEPS = 20
"""Newton steps for the biases alone at most."""


def certified_excess(objective: Objective, point: Point, gradient: torch.Tensor, c: float) -> float:
    """Upper bound on the objective of a point less the minimum over weights and biases; exact but for rounding.

    Each loss is the largest of p'·z - y·z + entropy(p') over probabilities p'. With any p' that predict each class as
    often as it occurs (which is what a bias without penalty demands), the minimum over weights and biases is at least

        C * sum_i w_i entropy(p'_i) - |C * sum_i w_i x_i (p'_i - y_i)|^2 / 2,

    so that the excess is at most C * sum_i w_i KL(p'_i, p_i) + |W + C * sum_i w_i x_i (p'_i - y_i)|^2 / 2. Here p' are
    the point's p, with the surplus of classes that are predicted too often moved, row by row, to the others.

    Args:
        objective: what is minimised.
        point: where.
        gradient: there, [R, K].
        c: inverse regularisation strength.
    """
    classes = gradient.shape[1]
    surplus = gradient[-1].double() / c  # [K]: how much more often a class is predicted than it occurs
    totals, weight = objective.class_totals(classes).double(), objective.total_weight
    slope, divergence = gradient.clone(), 0.0
    for rows in objective.blocks(classes):
        of_row, change = objective.loss.balance(point.probability[rows].double(), surplus, totals, weight)
        weights = objective.sample_weights
        divergence += float((of_row if weights is None else of_row * weights[rows, 0]).sum())
        slope.addmm_(objective.columns[rows].T, objective.weigh(change.to(slope.dtype), rows), alpha=c)
    objective.products += 0.5
    return c * divergence + float(slope[:-1].double().square().sum()) / 2


def settle_biases(objective: Objective, point: Point, c: float, allowed: float) -> Point:
    """The point with biases that are best for its weights, as far as an excess of `allowed` could show it.

    Newton's method on the biases alone, whose Hessian is small: [K, K].
    """
    for _ in range(BIAS_STEPS):
        slope, curvature = _bias_derivatives(objective, point)
        if 100 * c * float(slope.abs().sum()) <= allowed:
            break
        step = -torch.linalg.pinv(curvature, hermitian=True) @ slope  # softmax: equal steps of all change nothing
        weights = point.weights.clone()
        weights[-1] += step.to(weights.dtype)
        tried = objective.evaluate(weights, c)
        if not tried.value < point.value:
            break
        point = tried
    return point


def _bias_derivatives(objective: Objective, point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [K] and Hessian [K, K] of the summed loss by the biases, float64."""
    classes = point.weights.shape[1]
    slope = torch.zeros(classes, dtype=torch.float64, device=point.weights.device)
    curvature = torch.zeros(classes, classes, dtype=torch.float64, device=point.weights.device)
    for rows in objective.blocks(classes):
        probability = point.probability[rows]
        residual = objective.loss.residual(probability, objective.targets[rows])
        slope += objective.weigh(residual, rows).sum(dim=0, dtype=torch.float64)
        weights = objective.sample_weights
        curvature += objective.loss.bias_curvature(probability, None if weights is None else weights[rows]).double()
    return slope, curvature
