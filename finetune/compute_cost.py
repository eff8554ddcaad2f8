"""Hours that a fine-tune will take, from the tower's shape and the speed of this device's matrix products."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from eva_clip.flops import vision_gflop

if TYPE_CHECKING:
    from eva_clip.spec_types import ModelSpec
    from finetune.sections import TuneSection

EFFICIENCY = 0.5
"""Share of the speed of plain matrix products that a training step is taken to reach; norms, activations, the optimizer
and images that are waited for take the rest. Small models reach less, large ones on a GPU more."""


def forward_equivalents(tune: TuneSection, layers: int, *, checkpointing: bool, dropped: float = 0.0) -> float:
    """Cost of one training image in forward passes of the tower.

    A pass back costs one for the gradients of activations, and one for those of weights that are trained. What lies
    below the lowest trained layer needs neither.

    Args:
        tune: what is trained.
        layers: blocks of the tower.
        checkpointing: every block that is passed back through is computed once more.
        dropped: share of the blocks' work that dropped paths leave out.
    """
    weights = {"all": 1.0, "last_blocks": 1.0}.get(tune.what, 0.0)
    reached = {"head": 0.0, "last_blocks": tune.blocks / layers}.get(tune.what, 1.0)
    return (1 - dropped) * (1 + reached * (1 + weights + checkpointing))


def predict_hours(spec: ModelSpec, images: int, passes: float, tflops: float) -> float:
    """Hours that images take.

    Args:
        spec: the model at the recipe's resolution.
        images: views, over all epochs.
        passes: what each costs; of `forward_equivalents` when it is trained on.
        tflops: 10^12 operations a second of plain matrix products, over all devices.
    """
    return images * passes * vision_gflop(spec.vision) / 1e3 / (EFFICIENCY * tflops) / 3600


def measure_tflops(precision: str, seconds: float = 0.3) -> float:
    """Speed of plain matrix products on this device in 10^12 operations a second; the best of repeated products."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 1024
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left = torch.randn(side, side, device=device).to(dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def measure_peak_gib() -> tuple[float, str]:
    """Highest memory so far in GiB, and of what: tensors on the GPU, or all that the process held."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30, "tensors on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, "the whole process"
