"""Features centred and turned onto their principal axes: fewer columns, better conditioned, same penalised problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_ROWS = 8192
"""Rows that are held in float64 at a time."""


@dataclass(frozen=True)
class PrincipalAxes:
    """A rotation of feature space, which changes no Euclidean norm of weights, and the features' mean."""

    mean: torch.Tensor
    """float64 [D]."""
    axes: torch.Tensor
    """float64 [D, R], orthonormal columns; R is the rank of the centred features."""
    variances: torch.Tensor
    """float64 [R], sum of squares of the centred features along each axis, ascending."""

    def rotate(self, features: torch.Tensor) -> torch.Tensor:
        """Features [N, D] to coordinates [N, R] on the axes, in the dtype of `features`."""
        blocks = [
            ((block.double() - self.mean) @ self.axes).to(features.dtype) for block in torch.split(features, BLOCK_ROWS)
        ]
        return torch.cat(blocks)

    def to_features(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [R, C] and bias [C] on the axes, as weight [C, D] and bias [C] on the features themselves."""
        original = (self.axes @ weight.double()).T  # [C, D]
        return original, bias.double() - original @ self.mean


def find_principal_axes(features: torch.Tensor) -> PrincipalAxes:
    """The axes along which features [N, D] vary, from the Gram matrix in float64; constant directions are dropped.

    Costs min(N, D)^2 * max(N, D) operations, once.
    """
    count, width = features.shape
    mean = features.mean(dim=0, dtype=torch.float64)
    basis = None
    if count < width:  # all variation lies in the span of the N rows
        basis = torch.linalg.qr((features.double() - mean).T).Q  # [D, N]
        width = count
    gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for block in torch.split(features, BLOCK_ROWS):
        centred = block.double() - mean
        centred = centred if basis is None else centred @ basis
        gram += centred.T @ centred
    variances, axes = torch.linalg.eigh(gram)
    kept = variances > variances[-1] * width * torch.finfo(torch.float64).eps
    axes = axes[:, kept] if basis is None else basis @ axes[:, kept]
    return PrincipalAxes(mean, axes, variances[kept])


def check_finite_rows(features: torch.Tensor) -> None:
    """Raise ValueError naming the positions of rows that hold NaN or infinity; features are [N, D]."""
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{len(bad)} of {len(features)} feature rows are not finite, at position {shown}; extract them with "
            "precision fp32, or leave them out"
        )
