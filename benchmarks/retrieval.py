"""Memory and time of exact retrieval: 5,000 images against 25,000 texts of 1,024 dimensions, both ways.

    python -m benchmarks.retrieval

Peak memory is the process's high-water mark above what it held with both sets of embeddings in place; the time of the
bare matrix products in the same run stands beside it.
"""

from __future__ import annotations

import resource
import statistics
import time

import torch

from probes.ranking import recall_at_k

IMAGES, TEXTS, WIDTH, ROUNDS = 5_000, 25_000, 1_024, 3


def peak_gib() -> float:
    """High-water mark of resident memory (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print a Markdown table."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(TEXTS, WIDTH, generator=generator), dim=1)
    owner = torch.arange(IMAGES)
    text_owner = owner.repeat_interleave(TEXTS // IMAGES)
    held = peak_gib()
    ours, products = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        recall_at_k(images, owner, texts, text_owner)
        recall_at_k(texts, text_owner, images, owner)
        ours.append(time.perf_counter() - start)
        above = peak_gib() - held
        start = time.perf_counter()
        for first in range(0, IMAGES, 500):
            images[first : first + 500] @ texts.T
            texts[first * 5 : first * 5 + 2_500] @ images.T
        products.append(time.perf_counter() - start)
    median, bare = statistics.median(ours), statistics.median(products)
    print("| both ways, median (min-max) s | bare products, median s | ratio | peak above the embeddings |")
    print("|---|---|---|---|")
    print(f"| {median:.2f} ({min(ours):.2f}-{max(ours):.2f}) | {bare:.2f} | {median / bare:.2f} | {above:.2f} GiB |")


if __name__ == "__main__":
    main()
