"""Feature extraction on one batch of photographs at each library's defaults: ours, open_clip's and timm's.

    python -m benchmarks.features [MODEL] [LAYERS] [--precision auto|fp32|bf16]

The encoder has the model's shape (default OpenAI-CLIP-ViT-L-14's width, cut to 4 layers so that a round takes seconds)
and one set of seeded weights for all three. Ours is the recipes' default ("auto": bf16 where the device multiplies it
natively, else fp32), theirs is fp32. Rounds take turns; a ratio is of two times of one round. The cosine is of the
embedded model's real weights and of this encoder, against fp32, the lowest of all images. The device is named, and the
share of a measured matrix product printed. `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` stands for a processor
without bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from eva_clip import build_encoder
from eva_clip.encoder import FeatureDefinition, VisionEncoder
from eva_clip.flops import vision_gflop
from eva_clip.models import DTYPES
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_vision_tower
from eva_clip.transforms import build_eval_transform
from probes.precision import settle_precision
from probes.sections import Recipe, TrainerSection

BATCH, ROUNDS = 8, 5


def crops(size: int) -> torch.Tensor:
    """A batch [BATCH, 3, size, size] of different crops of scikit-learn's photographs."""
    from PIL import Image

    view, pictures = build_eval_transform(size), []
    for number in range(BATCH):
        picture = Image.fromarray(load_sample_images().images[number % 2])
        left, top = 25 * number % 300, 17 * number % 150
        pictures.append(view(picture.crop((left, top, left + 320, top + 260))))
    return torch.stack(pictures)


def lowest_cosine(full: VisionEncoder, half: VisionEncoder, images: torch.Tensor) -> float:
    """Lowest cosine over the images between two encoders' features."""
    return float(F.cosine_similarity(full(images).float(), half(images).float()).min())


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a square matrix product."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="OpenAI-CLIP-ViT-L-14")
    parser.add_argument("layers", nargs="?", type=int, default=4)
    parser.add_argument("--precision", default=TrainerSection().precision, help="ours")
    return parser.parse_args()


def measure(ways: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Seconds of every round."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(ROUNDS + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first warms up
                times[way].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print Markdown tables."""
    arguments = parse()
    recipe, said = settle_precision(Recipe(trainer=TrainerSection(precision=arguments.precision)))
    precision, device = recipe.trainer.precision, "cuda" if torch.cuda.is_available() else "cpu"
    spec = get_model_spec(arguments.model)
    spec = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, layers=arguments.layers))
    torch.manual_seed(0)
    tower = build_vision_tower(spec).eval()
    state = tower.state_dict()

    def build(name: str) -> VisionEncoder:
        copy = build_vision_tower(spec).eval()
        copy.load_state_dict(state)
        return VisionEncoder(copy, spec, FeatureDefinition()).to(device, DTYPES[name])

    ours, full = build(precision), build("fp32")
    plain = tower.to(device)  # what timm.create_model gives: fp32, forward_features, then the class token
    images = crops(spec.vision.image_size).to(device)

    def by_timm() -> None:
        with torch.no_grad():
            plain.forward_features(images)[:, 0]

    def by_open_clip() -> None:  # open_clip wraps the same tower (visual.trunk) and projects
        with torch.no_grad():
            plain(images)

    own = f"ours, {precision}"
    times = measure({own: lambda: ours(images), "timm, fp32": by_timm, "open_clip, fp32": by_open_clip}, device)
    layers = get_model_spec(arguments.model).vision.layers
    print(
        f"{arguments.model}, {arguments.layers} of {layers} layers, {BATCH} images, {torch.get_num_threads()} threads"
    )
    print(f"ours: {said}\n\n| way | images/s, median | ours over it, median (min-max) |\n|---|---|---|")
    for way, values in times.items():
        ratios = [theirs / mine for theirs, mine in zip(values, times[own], strict=True)]
        print(
            f"| {way} | {BATCH / statistics.median(values):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    rate = BATCH / statistics.median(times[own]) * vision_gflop(spec.vision) / 1e3
    peak = matrix_peak(DTYPES[precision], device)
    print(f"\n{rate:.2f} TFLOP/s, {100 * rate / peak:.0f} % of a {precision} matrix product's {peak:.2f}")
    nano = {way: build_encoder("EVA01-CLIP-nano", precision=way)[0].to(device) for way in ("fp32", precision)}
    small = crops(nano["fp32"].spec.vision.image_size).to(device)
    print(
        f"lowest cosine to fp32: {lowest_cosine(full, ours, images):.5f} here, "
        f"{lowest_cosine(nano['fp32'], nano[precision], small):.5f} EVA01-CLIP-nano"
    )


if __name__ == "__main__":
    main()
