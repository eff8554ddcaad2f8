"""Extract the features of a split once and keep them under a name that hashes all that determines them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from probes.progress import track

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from eva_clip.encoder import VisionEncoder

FORMAT = 1
"""Raised whenever the extraction changes what the same key would hold."""


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of one split, held in memory."""

    features: torch.Tensor
    """[N, D], in the encoder's dtype."""
    index: torch.Tensor
    """int64 [N]: position of each row in its split (rows of unreadable images are absent)."""

    def __len__(self) -> int:
        return len(self.features)


def feature_key(encoder: VisionEncoder, sample_fingerprint: str) -> dict[str, Any]:
    """Everything that determines the features of a split under the evaluation view."""
    spec = encoder.spec
    return {
        "format": FORMAT,
        "weights": encoder.weights_sha256(),
        "definition": dataclasses.asdict(encoder.definition),
        "image_size": spec.vision.image_size,
        "transform": "resize short side bicubic antialias, centre crop",
        "mean": list(spec.image_mean),
        "std": list(spec.image_std),
        "precision": str(next(encoder.parameters()).dtype).removeprefix("torch."),
        "samples": sample_fingerprint,
    }


def load_or_extract(
    encoder: VisionEncoder,
    batches: DataLoader[Any],
    *,
    key: Mapping[str, Any],
    folder: Path,
    name: str,
    device: torch.device,
) -> FeatureSet:
    """Features from the cache, or from one pass of the encoder over `batches`, which is then cached.

    Args:
        encoder: the frozen encoder.
        batches: batches with `image` [B, 3, H, W] and `index` [B], the evaluation view in order.
        key: `feature_key(...)`.
        folder: the cache.
        name: what to call the split in progress lines.
        device: where the encoder runs.

    Raises:
        ValueError: a feature is not finite; the sample's index is named.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("key") == text:
                found = FeatureSet(stored.get_tensor("features"), stored.get_tensor("index"))
                print(f"features of {name}: {len(found)} from the cache")
                return found
    encoder = encoder.to(device)
    features, indices = [], []
    for batch in track(batches, f"features of {name}", len(batches)):
        if len(batch["index"]):
            features.append(encoder(batch["image"].to(device)).cpu())
            indices.append(batch["index"])
    if not features:
        raise ValueError(f"no image of {name} could be read")
    extracted = FeatureSet(torch.cat(features), torch.cat(indices))
    _check_finite(extracted, name)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".partial-{os.getpid()}")
    tensors = {"features": extracted.features, "index": extracted.index}
    save_file(tensors, temporary, metadata={"key": text})
    temporary.replace(path)
    return extracted


def _check_finite(extracted: FeatureSet, name: str) -> None:
    bad = (~extracted.features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} features of {name} are not finite, the first at sample {int(extracted.index[bad[0]])}; "
            "use trainer.precision=fp32, or check the weights"
        )
