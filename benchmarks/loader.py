"""Decode and view of one image on one core: ours, timm's and torchvision's, on the same JPEG files.

    python -m benchmarks.loader

timm's and torchvision's are their default evaluation transforms on Pillow images (bicubic, the same view). Differences
are in steps of 1/255 from torchvision's on Pillow. The second table is of the published fine-tuning view (random
resized crop, flip, RandAugment), ours seeded by sample, timm's as its own training script builds it. Rounds take turns;
a ratio is of two times of one round.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

from eva_clip.specs import CLIP_MEAN, CLIP_STD
from eva_clip.transforms import build_eval_transform
from finetune.sections import AugmentSection
from finetune.views import FinetuneTransform, replace_posterize
from probes.data import decode

SIZES = [(500, 375), (640, 427), (1280, 853)]
ROUNDS, PER_ROUND = 15, 8


def encode(width: int, height: int) -> list[bytes]:
    """scikit-learn's two photographs as JPEG files of a size, quality 90."""
    files = []
    for pixels in load_sample_images().images:
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def open_rgb(data: bytes) -> Image.Image:
    """As torchvision's and timm's loaders open a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def time_ways(
    ways: dict[str, Callable[[bytes], object]], files: list[bytes], per_round: int = PER_ROUND
) -> dict[str, list[float]]:
    """Seconds an image of every way and round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(per_round):
                for data in files:
                    way(data)
            times[name].append((time.perf_counter() - start) / (per_round * len(files)))
    return times


def describe_ratio(times: dict[str, list[float]], peer: str) -> str:
    """How many times as fast ours is, median and range."""
    over = [theirs / mine for theirs, mine in zip(times[peer], times["ours"], strict=True)]
    return f"{statistics.median(over):.2f} ({min(over):.2f}-{max(over):.2f})"


def main() -> None:
    """Print two Markdown tables."""
    torch.set_num_threads(1)
    compare_evaluation_views()
    print()
    compare_training_views()


def compare_training_views() -> None:
    """The published fine-tuning view. timm's gets our posterize: Pillow 13 refuses some of its draws."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    ours = FinetuneTransform(224, CLIP_MEAN, CLIP_STD, AugmentSection())
    by_timm = timm.data.create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None,
        interpolation="bicubic",
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    replace_posterize(by_timm.transforms)
    generator = torch.Generator().manual_seed(0)
    ways: dict[str, Callable[[bytes], object]] = {
        "ours": lambda data: ours(decode(data), generator),
        "timm": lambda data: by_timm(open_rgb(data)),
        "decoding alone": decode,
    }
    print("| image | ours, images/s a core | timm | decoding alone | over timm (min-max) |\n|---|---|---|---|---|")
    for width, height in SIZES:
        times = time_ways(ways, encode(width, height), 5 * PER_ROUND)  # what is drawn costs more or less
        rates = " | ".join(f"{1 / statistics.median(values):.0f}" for values in times.values())
        print(f"| {width} x {height} | {rates} | {describe_ratio(times, 'timm')} |", flush=True)


def compare_evaluation_views() -> None:
    """The evaluation view."""
    ours = build_eval_transform(224)
    by_timm = timm.data.create_transform(
        224, is_training=False, interpolation="bicubic", crop_pct=1.0, mean=CLIP_MEAN, std=CLIP_STD
    )
    by_torchvision = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    ways: dict[str, Callable[[bytes], object]] = {
        "ours": lambda data: ours(decode(data)),
        "timm": lambda data: by_timm(open_rgb(data)),
        "torchvision": lambda data: by_torchvision(open_rgb(data)),
        "decoding alone": decode,
    }
    columns = ["image", "ours, images/s", "timm", "torchvision", "decoding alone", "over timm (min-max)"]
    print(f"| {' | '.join([*columns, 'over torchvision', 'largest difference'])} |")
    print("|---|---|---|---|---|---|---|---|")
    for width, height in SIZES:
        files = encode(width, height)
        times = time_ways(ways, files)
        rates = {name: f"{1 / statistics.median(values):.0f}" for name, values in times.items()}
        spread, other = (describe_ratio(times, peer) for peer in ("timm", "torchvision"))
        std = torch.tensor(CLIP_STD).view(3, 1, 1)
        worst = max(
            float(((ours(decode(data)) - by_torchvision(open_rgb(data))) * std * 255).abs().max()) for data in files
        )
        print(f"| {width} x {height} | {' | '.join(rates.values())} | {spread} | {other} | {worst:.2f} |", flush=True)


if __name__ == "__main__":
    main()
