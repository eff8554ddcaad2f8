"""Exact ranks and recall at k between two sets of embeddings, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from probes.finite import check_finite
from probes.processes import gather_rows, share

BLOCK_BYTES = 2**27
"""Memory of one block of scores and masks."""


def rank_first_match(
    queries: torch.Tensor, query_owner: torch.Tensor, gallery: torch.Tensor, gallery_owner: torch.Tensor
) -> torch.Tensor:
    """Rank of each query's best matching item, from 1; items match where owners are equal.

    A non-matching item with the very score of the best matching one ranks before it, so that constant embeddings
    score as badly as they are. Under `join_processes` each process ranks its share of the blocks.

    Args:
        queries: float32 [Q, D], unit length.
        query_owner: int64 [Q].
        gallery: float32 [G, D], unit length.
        gallery_owner: int64 [G].

    Returns:
        int64 [Q], all of them in every process.

    Raises:
        ValueError: a query without any matching item, or embeddings that are not finite.
    """
    for name, embeddings in (("queries", queries), ("gallery", gallery)):
        check_finite(embeddings, f"embedding(s) of the {name}")
    rows = max(1, BLOCK_BYTES // (max(1, len(gallery)) * 12))  # 4 bytes of score, its masked copy, and masks
    ranks, index = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for start in share(range(0, len(queries), rows)):
        scores = queries[start : start + rows] @ gallery.T  # [b, G]
        matching = query_owner[start : start + rows, None] == gallery_owner[None]
        best = scores.masked_fill(~matching, -torch.inf).amax(dim=1, keepdim=True)
        if torch.isinf(best).any():
            raise ValueError(f"query {start + int(torch.isinf(best).nonzero()[0, 0])} has no match in the gallery")
        ranks.append(1 + ((scores >= best) & ~matching).sum(dim=1))
        index.append(torch.arange(start, start + len(scores)))
    gathered, positions = gather_rows(torch.cat(ranks), torch.cat(index))
    assert len(positions) == len(queries)
    return gathered


def recall_of_ranks(ranks: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share (percent) of the ranks [Q], counted from 1, that are at most k."""
    return {k: 100 * int((ranks <= k).sum()) / len(ranks) for k in ks}


def recall_at_k(
    queries: torch.Tensor,
    query_owner: torch.Tensor,
    gallery: torch.Tensor,
    gallery_owner: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of queries (percent) with a matching item among their k nearest; arguments as in `rank_first_match`."""
    return recall_of_ranks(rank_first_match(queries, query_owner, gallery, gallery_owner), ks)
