"""Exact recall at k between two sets of embeddings, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK_BYTES = 2**27
"""Memory of one block of scores and masks."""


def recall_at_k(
    queries: torch.Tensor,
    query_owner: torch.Tensor,
    gallery: torch.Tensor,
    gallery_owner: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of queries (percent) with a matching item among their k nearest; items match where owners are equal.

    A non-matching item with the very score of the best matching one ranks before it, so that constant embeddings
    score as badly as they are.

    Args:
        queries: float32 [Q, D], unit length.
        query_owner: int64 [Q].
        gallery: float32 [G, D], unit length.
        gallery_owner: int64 [G].
        ks: cut-offs.

    Raises:
        ValueError: a query without any matching item.
    """
    rows = max(1, BLOCK_BYTES // (len(gallery) * 12))  # 4 bytes of score, its masked copy, and masks
    hits = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ gallery.T  # [b, G]
        matching = query_owner[start : start + rows, None] == gallery_owner[None]
        best = scores.masked_fill(~matching, -torch.inf).amax(dim=1, keepdim=True)
        if torch.isinf(best).any():
            raise ValueError(f"query {start + int(torch.isinf(best).nonzero()[0, 0])} has no match in the gallery")
        rank = ((scores >= best) & ~matching).sum(dim=1)
        for k in ks:
            hits[k] += int((rank < k).sum())
    return {k: 100 * count / len(queries) for k, count in hits.items()}
