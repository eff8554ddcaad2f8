"""Truncated Newton for penalised linear models: conjugate gradients on the exact Hessian, stopped by a certificate.

Shapes: N samples, R columns of which the last is the constant 1 of the bias, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from probes.certificate import certified_excess, settle_biases
from probes.regression_losses import Loss

BLOCK_BYTES = 2**27
"""Memory of one block of logits and what is computed from them."""
RESIDUAL_REDUCTION = 0.1
"""Where conjugate gradients stop: the preconditioned residual norm over its first value."""
MAX_DIRECTIONS = 500
"""Conjugate directions of one Newton step at most."""


@dataclass
class Point:
    """The objective at some weights."""

    weights: torch.Tensor
    """[R, K], the bias in the last row."""
    value: float
    probability: torch.Tensor
    """[N, K]."""


@dataclass(frozen=True)
class Minimum:
    """Where the minimisation stopped."""

    weights: torch.Tensor
    """[R, K], the bias in the last row."""
    value: float
    gradient_norm: float
    """Euclidean norm of the gradient by the penalised weights."""
    iterations: int
    converged: bool


class Objective:
    """C * sum_i w_i loss(x_i W, y_i) + |W|^2 / 2, where the last row of W, the bias, has no penalty."""

    def __init__(
        self, columns: torch.Tensor, targets: torch.Tensor, sample_weights: torch.Tensor | None, loss: Loss
    ) -> None:
        self.columns, self.targets, self.loss = columns, targets, loss
        self.sample_weights = sample_weights  # [N, 1]
        self.products = 0.0  # passes over the columns, there and back
        self.penalty = torch.ones(columns.shape[1], 1, dtype=columns.dtype, device=columns.device)
        self.penalty[-1] = 0

    def evaluate(self, weights: torch.Tensor, c: float) -> Point:
        """The objective and the probabilities at weights [R, K]."""
        probability = self.columns.new_empty(len(self.columns), weights.shape[1])
        total = 0.0
        for rows in self.blocks(weights.shape[1]):
            losses, probability[rows] = self.loss.evaluate(self.columns[rows] @ weights, self.targets[rows])
            if self.sample_weights is not None:
                losses = losses * self.sample_weights[rows, 0]
            total += float(losses.sum(dtype=torch.float64))
        self.products += 0.5
        return Point(weights, c * total + _squared_norm(weights[:-1]) / 2, probability)

    def gradient(self, point: Point, c: float) -> torch.Tensor:
        """Gradient [R, K]."""
        slope = point.weights * self.penalty
        for rows in self.blocks(slope.shape[1]):
            residual = self.weigh(self.loss.residual(point.probability[rows], self.targets[rows]), rows)
            slope.addmm_(self.columns[rows].T, residual, alpha=c)
        self.products += 0.5
        return slope

    def curve(self, point: Point, direction: torch.Tensor, c: float) -> torch.Tensor:
        """Hessian times a direction, both [R, K]."""
        curved = direction * self.penalty
        for rows in self.blocks(curved.shape[1]):
            change = self.loss.curve(point.probability[rows], self.columns[rows] @ direction)
            curved.addmm_(self.columns[rows].T, self.weigh(change, rows), alpha=c)
        self.products += 1
        return curved

    def diagonal(self, point: Point, c: float) -> torch.Tensor:
        """Diagonal of the Hessian, [R, K]."""
        found = self.penalty.expand(-1, point.weights.shape[1]).clone()
        for rows in self.blocks(found.shape[1]):
            variance = point.probability[rows] * (1 - point.probability[rows])
            found.addmm_(self.columns[rows].square().T, self.weigh(variance, rows), alpha=c)
        self.products += 0.5
        return found.clamp_(min=torch.finfo(found.dtype).tiny)

    @property
    def total_weight(self) -> float:
        """Sum of the sample weights."""
        weights = self.sample_weights
        return float(len(self.columns) if weights is None else weights.sum(dtype=torch.float64))

    def class_totals(self, classes: int) -> torch.Tensor:
        """Weight of the samples of each class, [K]."""
        weights = self.sample_weights
        of_sample = self.columns.new_ones(len(self.columns)) if weights is None else weights[:, 0]
        if self.targets.ndim == 1:
            return self.columns.new_zeros(classes).index_add_(0, self.targets, of_sample)
        return of_sample @ self.targets

    def weigh(self, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """Values [b, K] of these rows times the samples' weights."""
        return values if self.sample_weights is None else values * self.sample_weights[rows]

    def blocks(self, num_classes: int) -> list[slice]:
        """Parts of the rows that fit `BLOCK_BYTES`."""
        size = max(1, BLOCK_BYTES // (self.columns.element_size() * (self.columns.shape[1] + 4 * num_classes)))
        return [slice(start, start + size) for start in range(0, len(self.columns), size)]


def minimise(
    objective: Objective, start: Point, c: float, *, constant: float, tolerance: float, max_iterations: int
) -> Minimum:
    """Minimise from `start` until the certified excess is small enough.

    Half the squared gradient norm (the objective is strongly convex in the penalised weights with constant 1) and the
    biases' at the curvature of the point estimate the excess over the minimum. Where that is small enough the biases
    are settled and `certified_excess` bounds it, biases included. The bound is held against the objective, and against
    what the weights gain over the best constant classifier: at strong regularisation a tiny part of the objective.

    Args:
        objective: what to minimise.
        start: where to begin, evaluated at this `c`.
        c: inverse regularisation strength.
        constant: the objective of the best constant classifier.
        tolerance: largest certified excess, relative to both.
        max_iterations: Newton steps at most.
    """
    point, iteration = start, 0
    while True:
        gradient = objective.gradient(point, c)
        diagonal = objective.diagonal(point, c)
        squared = _squared_norm(gradient[:-1])
        estimate = squared / 2 + float((gradient[-1].double().square() / diagonal[-1]).sum()) / 2
        gained = max(_squared_norm(point.weights[:-1]) / 2, constant - point.value)
        allowed = tolerance * min(point.value, gained)
        converged = estimate <= allowed
        if converged:
            point = settle_biases(objective, point, c, allowed)
            gradient = objective.gradient(point, c)
            converged = certified_excess(objective, point, gradient, c) <= allowed
        moved = None
        if not converged and iteration < max_iterations:
            moved = _search(objective, point, gradient, _newton_step(objective, point, gradient, diagonal, c), c)
        if moved is None:
            return Minimum(point.weights, point.value, math.sqrt(squared), iteration, converged)
        point, iteration = moved, iteration + 1


def _newton_step(
    objective: Objective, point: Point, gradient: torch.Tensor, diagonal: torch.Tensor, c: float
) -> torch.Tensor:
    """Conjugate gradients on Hessian * step = -gradient, preconditioned by the diagonal; step [R, K]."""
    step, residual = torch.zeros_like(gradient), -gradient
    direction = residual / diagonal
    first = size = _dot(residual, direction)
    for _ in range(MAX_DIRECTIONS):
        curved = objective.curve(point, direction, c)
        curvature = _dot(direction, curved)
        if not curvature > 0:  # rounding has the last word
            break
        step.add_(direction, alpha=size / curvature)
        residual.sub_(curved, alpha=size / curvature)
        scaled = residual / diagonal
        previous, size = size, _dot(residual, scaled)
        if size <= RESIDUAL_REDUCTION**2 * first:
            break
        direction = scaled.add_(direction, alpha=size / previous)
    return step


def _search(objective: Objective, point: Point, gradient: torch.Tensor, step: torch.Tensor, c: float) -> Point | None:
    """The first of step, step / 2, step / 4, ... that lowers the objective enough; None where rounding hides it."""
    slope = _dot(gradient, step)
    rounding = torch.finfo(step.dtype).eps * abs(point.value)
    for halvings in range(20):
        share = 0.5**halvings
        tried = objective.evaluate(point.weights + share * step, c)
        if tried.value <= point.value + 1e-4 * share * slope + rounding:
            return tried
    return None


def _dot(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))


def _squared_norm(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
