"""EVA-CLIP as a library: architectures, official weights, position embeddings, features, transforms, tokenizer.

Names are imported on first use, so that `import eva_clip` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_clip.checkpoints import Checkpoint, LoadReport, load_checkpoint
    from eva_clip.classifier import Classifier, build_classifier
    from eva_clip.encoder import FeatureDefinition, VisionEncoder, build_encoder
    from eva_clip.export import (
        save_for_open_clip,
        save_for_timm,
        save_model,
        to_open_clip_state_dict,
        to_timm_state_dict,
    )
    from eva_clip.models import EvaCLIP, build_eva_model_and_transforms, build_model
    from eva_clip.pos_embed import resize_pos_embed
    from eva_clip.spec_types import ModelSpec
    from eva_clip.specs import add_model_config, get_model_spec, list_models
    from eva_clip.tokenizer import tokenize

__all__ = [
    "Checkpoint",
    "Classifier",
    "EvaCLIP",
    "FeatureDefinition",
    "LoadReport",
    "ModelSpec",
    "VisionEncoder",
    "add_model_config",
    "build_classifier",
    "build_encoder",
    "build_eva_model_and_transforms",
    "build_model",
    "get_model_spec",
    "list_models",
    "load_checkpoint",
    "resize_pos_embed",
    "save_for_open_clip",
    "save_for_timm",
    "save_model",
    "to_open_clip_state_dict",
    "to_timm_state_dict",
    "tokenize",
]

_HOME = {
    "Checkpoint": "checkpoints",
    "Classifier": "classifier",
    "EvaCLIP": "models",
    "FeatureDefinition": "encoder",
    "LoadReport": "checkpoints",
    "ModelSpec": "spec_types",
    "VisionEncoder": "encoder",
    "add_model_config": "specs",
    "build_classifier": "classifier",
    "build_encoder": "encoder",
    "build_eva_model_and_transforms": "models",
    "build_model": "models",
    "get_model_spec": "specs",
    "list_models": "specs",
    "load_checkpoint": "checkpoints",
    "resize_pos_embed": "pos_embed",
    "save_for_open_clip": "export",
    "save_for_timm": "export",
    "save_model": "export",
    "to_open_clip_state_dict": "export",
    "to_timm_state_dict": "export",
    "tokenize": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eva_clip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eva_clip.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
