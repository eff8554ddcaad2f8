"""How good is EVA01-CLIP-nano on the held-out vendor, beside a random copy of it and raw pixels?

    python -m scripts.nano.evaluate recipes/quickstart/pictures [--weights FILE]

Prints top-1 (%) of the `within` probe (Twemoji 70/30), of the `across` probe (Noto -> all of Twemoji), and
retrieval of each Twemoji picture's name among all names of the shards (R@1, R@5). The random encoder is a
mean over three seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from eva_clip.models import build_model
from scripts.nano.probe import Shard, evaluate, load_shards, transfer

MODEL = "EVA01-CLIP-nano"
RANDOM_SEEDS = (0, 1, 2)


def raw_pixels(shards: dict[str, Shard], size: int) -> dict[str, float]:
    """Both transfers of the picture's own values at size x size pixels (3 * size ** 2 features).

    Values are in [0, 1] and only centred: dividing by each pixel's deviation blows up the ever-white margins of one
    vendor on another vendor's pictures.
    """
    pixels = {}
    for key, shard in shards.items():
        images = shard.images
        if size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="area")
        pixels[key] = images.flatten(1).numpy()
    return transfer(pixels, shards, standardise=False)


def random_encoder(shards: dict[str, Shard]) -> dict[str, float]:
    """Mean over seeds of both transfers and of retrieval, for freshly initialised copies."""
    rows = []
    for seed in RANDOM_SEEDS:
        torch.manual_seed(seed)
        rows.append(evaluate(build_model(MODEL)[0], shards))
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of the quickstart shards")
    parser.add_argument("--weights", default="pretrained", help="weights file; the shipped one by default")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shards = load_shards(arguments.shards)
    counts = ", ".join(f"{key} {len(shard.labels)}" for key, shard in shards.items())
    print(f"{counts}; {len(set(shards['noto'].labels))} classes")
    print(f"{'':26s} {'within':>7s} {'across':>7s} {'R@1':>7s} {'R@5':>7s}")
    rows: dict[str, Callable[[], dict[str, float]]] = {
        MODEL: lambda: evaluate(build_model(MODEL, arguments.weights)[0], shards),
        "random encoder (3 seeds)": lambda: random_encoder(shards),
        "raw pixels, 64 x 64": lambda: raw_pixels(shards, 64),
        "raw pixels, 16 x 16": lambda: raw_pixels(shards, 16),
        "raw pixels, 8 x 8": lambda: raw_pixels(shards, 8),
    }
    for name, measure in rows.items():
        result = measure()
        cells = [f"{result[key]:7.1f}" if key in result else f"{'-':>7s}" for key in ("within", "across", "R@1", "R@5")]
        print(f"{name:26s} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
