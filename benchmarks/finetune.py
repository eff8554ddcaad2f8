"""A fine-tuning step by `python -m finetune`'s module under Lightning against timm's own pieces in timm's loop.

    python -m benchmarks.finetune [MODEL BATCH] …

Both train one tower of the model's shape (default EVA01-CLIP-nano with 32 images, and EVA02-CLIP-B-16's tower cut to 4
layers with 8) from the same weights on the same batches in memory: layer-decayed AdamW, label smoothing, average of the
weights after each step, drop path at the rate named. timm's side is its tower with its own head,
`create_optimizer_v2`, `LabelSmoothingCrossEntropy`, `ModelEmaV3` and the body of its `train_one_epoch`. Rounds take
turns; a ratio is of two times of one round. Peak memory is the most that torch's tensors held at once, in a process
of its own, by torch's profiler; what the process takes from the system besides differs from run to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm.optim
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.utils import ModelEmaV3
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from eva_clip.classifier import Classifier
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_vision_tower
from finetune.drop_path import skip_dropped_paths
from finetune.module import FinetuneModule
from finetune.sections import FinetuneRecipe

DEFAULTS = ("EVA01-CLIP-nano", "32", "EVA02-CLIP-B-16", "8")
MAX_LAYERS, CLASSES, STEPS, ROUNDS = 4, 100, 6, 5
"""Steps of a round, of which the first is not counted."""


def shape_of(name: str) -> ModelSpec:
    """The model's shape, cut where it is large."""
    spec = get_model_spec(name)
    if spec.vision.width > 512:
        spec = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, layers=MAX_LAYERS))
    return spec


def make_batches(name: str, batch: int) -> list[dict[str, Any]]:
    """Seeded noise: what is measured does not depend on what is shown."""
    size, generator = get_model_spec(name).vision.image_size, torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(batch, 3, size, size, generator=generator),
            "target": torch.randint(CLASSES, (batch,), generator=generator),
            "index": torch.arange(batch),
            "skipped": [],
        }
        for _ in range(STEPS)
    ]


class Clock(pl.Callback):
    """Times of whole steps and of optimizer with average."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.updates: list[float] = []
        self._begin = 0.0

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Backward is done."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Optimizer and average are done."""
        self.marks.append(time.perf_counter())
        self.updates.append(self.marks[-1] - self._begin)


def by_us(name: str, rate: float, precision: str, batches: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a step, and of its optimizer with the average."""
    recipe = FinetuneRecipe()
    recipe.trainer.precision, recipe.ema.decay = precision, 0.9999
    torch.manual_seed(0)
    model = Classifier(shape_of(name), CLASSES, pool="gap", drop_path_rate=rate).train()
    skip_dropped_paths(model.tower)
    module, clock = FinetuneModule(model, recipe, torch.ones(STEPS).double().numpy(), []), Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return (clock.marks[-1] - clock.marks[0]) / (STEPS - 1), statistics.mean(clock.updates[1:])


def by_timm(name: str, rate: float, precision: str, batches: list[dict[str, Any]]) -> tuple[float, float]:
    """The same with timm's pieces, as its `train.py` calls them."""
    torch.manual_seed(0)
    model = build_vision_tower(shape_of(name), num_classes=CLASSES, global_pool="avg", drop_path_rate=rate).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=3e-5, weight_decay=0.05, layer_decay=0.9)
    criterion, average = LabelSmoothingCrossEntropy(0.3), ModelEmaV3(model, decay=0.9999)
    marks, updates = [], []
    for step, batch in enumerate(batches):
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with half:
            loss = criterion(model(batch["image"]), batch["target"])
        loss.backward()
        begin = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
        marks.append(time.perf_counter())
        updates.append(marks[-1] - begin)
    return (marks[-1] - marks[0]) / (STEPS - 1), statistics.mean(updates[1:])


WAYS: dict[str, Callable[..., tuple[float, float]]] = {"ours": by_us, "timm": by_timm}


def measure_peak(way: str, name: str, batch: int, rate: float, precision: str) -> float:
    """GiB that the tensors of a fresh process held at most; weights included, batches not."""
    command = [sys.executable, "-m", "benchmarks.finetune", "--peak", way, name, str(batch), str(rate), precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(way: str, name: str, batch: str, rate: str, precision: str) -> None:
    """The child of `measure_peak`."""
    batches = make_batches(name, int(batch))
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            WAYS[way](name, float(rate), precision, batches)
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    print(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 2**30)


def main() -> None:
    """Print a Markdown table."""
    warnings.simplefilter("ignore")
    arguments = sys.argv[1:] or list(DEFAULTS)
    if arguments[0] == "--peak":
        print_peak(*arguments[1:])
        return
    print(
        "| model, images | precision | drop path | timm, s a step | ours over timm's speed (min-max) | optimizer and "
        "average, ours | timm | peak of tensors, GiB, ours | timm |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, batch in zip(arguments[::2], map(int, arguments[1::2]), strict=True):
        batches = make_batches(name, batch)
        for precision in ("fp32", "bf16"):
            for rate in (0.0, 0.4):
                times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
                for _ in range(ROUNDS):
                    for way, step in WAYS.items():
                        times[way].append(step(name, rate, precision, batches))
                ratios = [theirs[0] / mine[0] for mine, theirs in zip(times["ours"], times["timm"], strict=True)]
                share = {way: statistics.median(update / whole for whole, update in times[way]) for way in WAYS}
                peak = {way: measure_peak(way, name, batch, rate, precision) for way in WAYS}
                print(
                    f"| {name}, {batch} | {precision} | {rate} | {statistics.median(t for t, _ in times['timm']):.3f} "
                    f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {share['ours']:.0%} "
                    f"| {share['timm']:.0%} | {peak['ours']:.3f} | {peak['timm']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
