"""The supported models by name: look-up, aliases, and models of one's own. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from eva_clip.model_table import BUILT_IN
from eva_clip.spec_files import read_model_config
from eva_clip.spec_types import CLIP_MEAN, CLIP_STD, HubFile, ModelSpec, TextConfig, VisionConfig

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HubFile",
    "ModelSpec",
    "TextConfig",
    "VisionConfig",
    "add_model_config",
    "all_model_specs",
    "get_model_spec",
    "list_models",
]

_REGISTRY: dict[str, ModelSpec] = {}
_OFFICIAL_NAME: dict[str, str] = {}


def _normalise(name: str) -> str:
    return name.lower().replace("_", "-")


def _register(spec: ModelSpec) -> None:
    _REGISTRY[spec.name] = spec
    for name in (spec.name, *spec.aliases):
        _OFFICIAL_NAME[_normalise(name)] = spec.name


def list_models() -> list[str]:
    """Official names of all models, those of `add_model_config` included, sorted."""
    return sorted(_REGISTRY)


def all_model_specs() -> list[ModelSpec]:
    """All specifications in the order of registration: the table's, the embedded model, then one's own."""
    return list(_REGISTRY.values())


def get_model_spec(name: str) -> ModelSpec:
    """Specification of a model by official name or alias; case, `-` and `_` do not matter.

    Raises:
        ValueError: unknown name; the message lists near matches and all known names.
    """
    official = _OFFICIAL_NAME.get(_normalise(name))
    if official is None:
        near = difflib.get_close_matches(_normalise(name), _OFFICIAL_NAME, n=1)
        hint = f"; did you mean {_OFFICIAL_NAME[near[0]]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} Known models: {', '.join(list_models())}")
    return _REGISTRY[official]


def add_model_config(path: str | Path) -> str:
    """Register a model from a JSON file in the published format; its name is the file's stem.

    The file holds `embed_dim`, `vision_cfg {image_size, layers, width, head_width, mlp_ratio, patch_size,
    drop_path_rate, family}`, `text_cfg {context_length, vocab_size, width, heads, layers}` and `quick_gelu`; those
    with a default may be left out.

    Returns:
        The registered name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; a key is missing or unknown; a value has the wrong type; the shapes contradict; or
            the name already belongs to a model of another shape.
    """
    spec = read_model_config(Path(path))
    taken = _OFFICIAL_NAME.get(_normalise(spec.name))
    if taken is not None and replace(_REGISTRY[taken], aliases=(), hub=None, embedded_weights="") != spec:
        raise ValueError(f"{path}: the name {spec.name!r} already belongs to another model; rename the file")
    if taken is None:
        _register(spec)
    return spec.name


def _register_nano() -> None:
    name = add_model_config(Path(__file__).parent / "nano" / "EVA01-CLIP-nano.json")
    _register(replace(_REGISTRY[name], aliases=("nano",), embedded_weights="nano/EVA01-CLIP-nano.safetensors"))


for _spec in BUILT_IN:
    _register(_spec)
_register_nano()
