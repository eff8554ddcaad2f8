"""The key of a store entry: all that determines the features of a split, and in what two keys differ. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.source_contract import some

if TYPE_CHECKING:
    from eva_clip.spec_types import ModelSpec
    from probes.splits import Split

FORMAT = 2
"""Raised whenever the extraction changes what the same key would hold."""
EVALUATION_VIEW = "resize short side bicubic antialias, centre crop"
TRAINING_VIEW = "one-shot random resized crop (area 0.08-1, aspect 3/4-4/3) bicubic antialias, flip 0.5"
KEY_FILE = "key.json"

Key = dict[str, Any]


def sample_list(split: Split) -> dict[str, Any]:
    """What identifies exactly these samples in exactly this order: rows of the store are positions in it."""
    order = hashlib.sha256(json.dumps(split.keys).encode()).hexdigest()
    return {"count": len(split), "fingerprint": split.fingerprint(), "order": order}


def feature_key(
    weights_sha256: str, spec: ModelSpec, precision: str, samples: Mapping[str, Any], *, view_seed: int | None = None
) -> Key:
    """Everything that determines the features of a split, except their kinds, which are arrays side by side.

    Args:
        weights_sha256: of the tower at this resolution and precision, without its projection.
        spec: the model at the recipe's resolution.
        precision: "fp32", "bf16" or "fp16".
        samples: `sample_list(split)`.
        view_seed: None for the evaluation view, else the seed of the augmented training views.
    """
    shape = {**dataclasses.asdict(spec.vision), "quick_gelu": spec.quick_gelu}
    shape.pop("drop_path_rate")  # no part of a frozen encoder
    view: dict[str, Any] = {"transform": EVALUATION_VIEW}
    if view_seed is not None:
        view = {"transform": TRAINING_VIEW, "seed": view_seed}
    key = {
        "format": FORMAT,
        "weights": weights_sha256,
        "definition": {"tower": shape, "tokens": "after the final norm"},
        "image_size": shape.pop("image_size"),
        **view,
        "mean": list(spec.image_mean),
        "std": list(spec.image_std),
        "precision": precision,
        "samples": dict(samples),
    }
    return dict(json.loads(json.dumps(key)))


def entry_name(key: Mapping[str, Any]) -> str:
    """Folder name of a key's entry: 32 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def differing_fields(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line a field in which two keys differ, such as "precision: stored fp32, asked bf16"."""
    flat_stored, flat_asked = _flatten(stored), _flatten(asked)
    return [
        f"{name}: stored {_short(flat_stored.get(name))}, asked {_short(flat_asked.get(name))}"
        for name in dict.fromkeys([*flat_asked, *flat_stored])
        if flat_stored.get(name) != flat_asked.get(name)
    ]


def describe_nearest(cache: Path, key: Mapping[str, Any], split_name: str) -> str | None:
    """Why no entry serves a key: the entry of the same split with the fewest differing fields, and these fields."""
    found: list[tuple[int, str, list[str]]] = []
    for path in sorted(cache.glob(f"*/{KEY_FILE}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            same_split = content["about"]["split"] == split_name
            differing = differing_fields(content["key"], key)
        except (ValueError, KeyError, TypeError, OSError):
            continue
        if same_split and differing:
            found.append((len(differing), path.parent.name, differing))
    if not found:
        return None
    _, name, differing = min(found)
    return f"the nearest stored entry, {name[:12]}, is of other features: {some(differing, 3)}"


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_digest else text
