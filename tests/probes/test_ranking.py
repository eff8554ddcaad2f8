"""Recall at k against a plain sort, on ties, several captions an image, and in small blocks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from probes import ranking
from probes.ranking import recall_at_k


def by_sorting(queries, query_owner, gallery, gallery_owner, k):
    hits = 0
    for query, owner in zip(queries, query_owner, strict=True):
        nearest = (gallery @ query).argsort(descending=True)[:k]
        hits += bool((gallery_owner[nearest] == owner).any())
    return 100 * hits / len(queries)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 16, generator=generator)
    owner = torch.arange(40).repeat_interleave(5)
    texts = images[owner] + 1.5 * torch.randn(200, 16, generator=generator)
    return F.normalize(images, dim=1), torch.arange(40), F.normalize(texts, dim=1), owner


@pytest.mark.parametrize("block_bytes", [1, 200 * 12 * 7, 2**27])
def test_recall_equals_a_plain_sort_whatever_the_block(pairs, monkeypatch, block_bytes):
    monkeypatch.setattr(ranking, "BLOCK_BYTES", block_bytes)
    images, image_owner, texts, text_owner = pairs
    for arguments in ((images, image_owner, texts, text_owner), (texts, text_owner, images, image_owner)):
        found = recall_at_k(*arguments)
        assert found == pytest.approx({k: by_sorting(*arguments, k) for k in (1, 5, 10)})
        assert 0 < found[1] < found[10]


def test_constant_embeddings_find_nothing():
    same = torch.ones(20, 4) / 2
    owner = torch.arange(20)
    assert recall_at_k(same, owner, same, owner) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_a_query_without_match_is_named():
    vectors = torch.eye(3)
    with pytest.raises(ValueError, match="query 2 has no match"):
        recall_at_k(vectors, torch.tensor([0, 1, 7]), vectors, torch.arange(3))
