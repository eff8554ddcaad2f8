"""`python -m probes.knn RECIPE`: weighted nearest neighbours among stored features."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probes.cli import run_command
from probes.feature_run import Samples, Scorer, execute_method, plan_method
from probes.method_sections import KnnRecipe, KnnSection

if TYPE_CHECKING:
    import torch

BLOCK_SIMILARITIES = 2**26
"""Similarities that are held at a time: 256 MiB."""


class Neighbours:
    """Votes of the nearest training images, each exp(cosine / temperature), as in DINO's weighted k-NN."""

    name, setting, refit = "knn", "k", True

    def __init__(self, section: KnnSection) -> None:
        self.section = section
        self.fixed = float(section.fixed)

    def path(self, train: Samples) -> Iterator[tuple[float, Scorer]]:
        """Most neighbours first: the smoothest decision."""
        usable = sorted({min(k, len(train)) for k in self.section.k}, reverse=True)
        for k in usable:
            yield float(k), self.fit(train, float(k))

    def fit(self, train: Samples, value: float) -> Scorer:
        """A scorer that compares with all of train."""
        import torch
        from torch.nn import functional as F

        keys, k = F.normalize(train.features, dim=1), min(int(value), len(train))
        block = max(1, BLOCK_SIMILARITIES // len(keys))

        def score(features: torch.Tensor) -> torch.Tensor:
            rows = [self._vote(rows, keys, train, k) for rows in torch.split(F.normalize(features, dim=1), block)]
            return torch.cat(rows)

        return score

    def _vote(self, queries: torch.Tensor, keys: torch.Tensor, train: Samples, k: int) -> torch.Tensor:
        """Logarithm of the votes [n, C], whose softmax is their share; with multi-hot targets the share itself."""
        import torch

        cosine, nearest = (queries @ keys.T).topk(k, dim=1)  # [n, k]
        strength = ((cosine - cosine[:, :1]) / self.section.temperature).exp()  # relative to the nearest
        if train.targets.ndim == 2:  # share of the votes for each class
            return torch.einsum("nk,nkc->nc", strength, train.targets[nearest]) / strength.sum(dim=1, keepdim=True)
        votes = torch.zeros(len(queries), train.num_classes).scatter_add_(1, train.targets[nearest], strength)
        return votes.clamp_(min=torch.finfo(votes.dtype).tiny).log_()


def plan(recipe: KnnRecipe) -> dict[str, Any]:
    """What `--plan` prints."""
    return plan_method(recipe, Neighbours(recipe.knn), recipe.knn.k)


def execute(recipe: KnnRecipe, recipe_path: str) -> None:
    """One run, from recipe to report."""
    execute_method(recipe, recipe_path, Neighbours(recipe.knn))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.knn",
        "Classify images by their nearest neighbours among the features of a frozen encoder.",
        schema=KnnRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
