"""Write models: in our own format, and for timm and open_clip."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eva_clip.classifier import Classifier
from eva_clip.encoder import VisionEncoder
from eva_clip.key_tables import CLIP_TEXT, CLIP_VISION, expand
from eva_clip.models import EvaCLIP
from eva_clip.spec_types import ModelSpec

TIMM_ARCHITECTURES = {
    "eva01": "eva_giant_patch14_clip_224",
    "eva02": "eva02_large_patch14_clip_224",
    "eva02_post_norm": "eva02_enormous_patch14_clip_224",
    "clip": "vit_large_patch14_clip_224",
}
"""timm's registered architecture of each family; its sizes are overridden where a model has others."""


def save_model(model: EvaCLIP | VisionEncoder | Classifier, path: str | Path) -> Path:
    """Save a model as safetensors under the published names; `load_checkpoint` and every builder read it back.

    Both towers: `visual.*`, `text.*`, `logit_scale`. An encoder: bare names. A classifier: bare names and `head.*`.
    The header names the model, the kind and the pooling. The file appears whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: another suffix than .safetensors.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} must end in .safetensors: a pickle (.pt) is not written because reading one may run code"
        )
    state, kind, pool = _named_state(model)
    metadata = {"format": "pt", "model": model.spec.name, "kind": kind, "pool": pool}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, str(part), metadata)
    os.replace(part, path)  # noqa: PTH105 (an atomic rename over an existing file)
    return path


def to_timm_state_dict(model: EvaCLIP | VisionEncoder | Classifier) -> dict[str, torch.Tensor]:
    """The vision tower under timm's names, for `timm.create_model(...).load_state_dict`.

    The projection, or a linear class head, is timm's `head`. CLIP's projection gets the zero bias that timm's head has.

    Raises:
        ValueError: a head of BatchNorm and Linear, which no timm model has.
    """
    if isinstance(model, Classifier):
        if isinstance(model.head, nn.Sequential):
            raise ValueError("timm's models have no BatchNorm before their head; fold it into the linear layer first")
        return dict(model.tower.state_dict()) | {f"head.{key}": value for key, value in model.head.state_dict().items()}
    tower = model.visual if isinstance(model, EvaCLIP) else model.tower
    state: dict[str, torch.Tensor] = dict(tower.state_dict())
    if "head.weight" in state and "head.bias" not in state:
        state["head.bias"] = state["head.weight"].new_zeros(state["head.weight"].shape[0])
    return state


def to_open_clip_state_dict(model: EvaCLIP) -> dict[str, torch.Tensor]:
    """Both towers under open_clip's names, for `open_clip.create_model(...).load_state_dict`.

    EVA towers are timm's inside open_clip (`visual.trunk.*`); CLIP towers are its own, with the text tower at the top.
    """
    if model.spec.vision.family != "clip":
        vision = {f"visual.trunk.{name}": tensor for name, tensor in model.visual.state_dict().items()}
        text = {f"text.{name}": tensor for name, tensor in model.text.state_dict().items()}
        return vision | text | {"logit_scale": model.logit_scale.detach()}
    state = model.state_dict()
    rules = [
        (f"visual.{rule.theirs}", f"visual.{rule.ours}", rule) for rule in _expanded(CLIP_VISION, model.visual.blocks)
    ]
    rules += [(rule.theirs, rule.ours, rule) for rule in _expanded(CLIP_TEXT, model.text.transformer.resblocks)]
    named = {theirs: rule.to_theirs(state[ours]) for theirs, ours, rule in rules}
    return named | {"logit_scale": model.logit_scale.detach()}


def save_for_timm(model: EvaCLIP | VisionEncoder | Classifier, folder: str | Path) -> Path:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_timm_state_dict(model)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, str(folder / "model.safetensors")
    )
    outputs = state["head.weight"].shape[0] if "head.weight" in state else 0
    (folder / "config.json").write_text(
        json.dumps(timm_config(model.spec, outputs, "avg" if "fc_norm.weight" in state else "token"), indent=2)
    )
    return folder


def save_for_open_clip(model: EvaCLIP, folder: str | Path) -> Path:
    """A folder that `open_clip.create_model("local-dir:FOLDER")` opens; it refers to itself by absolute path."""
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    spec = model.spec
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in to_open_clip_state_dict(model).items()}
    save_file(state, str(folder / "open_clip_model.safetensors"), {"format": "pt"})
    text = {name: getattr(spec.text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    vision: dict[str, Any] = {"image_size": spec.vision.image_size}
    if spec.vision.family == "clip":
        vision |= {
            name: getattr(spec.vision, name) for name in ("layers", "width", "head_width", "mlp_ratio", "patch_size")
        }
        model_cfg: dict[str, Any] = {"quick_gelu": spec.quick_gelu}
    else:
        tower = folder / "vision_tower"
        tower.mkdir(exist_ok=True)
        (tower / "config.json").write_text(json.dumps(timm_config(spec, spec.embed_dim, "token"), indent=2))
        vision |= {"timm_model_name": f"local-dir:{tower}", "timm_pool": "token", "timm_proj": None}
        model_cfg = {"custom_text": True}
    model_cfg |= {"embed_dim": spec.embed_dim, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": list(spec.image_mean), "std": list(spec.image_std)}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    return folder


def timm_config(spec: ModelSpec, num_classes: int, global_pool: str) -> dict[str, Any]:
    """timm's `config.json` of a vision tower."""
    vision = spec.vision
    arguments: dict[str, Any] = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.width,
        "depth": vision.layers,
        "num_heads": vision.width // vision.head_width,
        "mlp_ratio": vision.mlp_ratio,
        "global_pool": global_pool,  # the entry of that name below does not reach the model
    }
    if spec.quick_gelu:
        arguments["act_layer"] = "quick_gelu"
    return {
        "architecture": TIMM_ARCHITECTURES[vision.family],
        "num_classes": num_classes,
        "num_features": vision.width,
        "global_pool": global_pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, vision.image_size, vision.image_size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(spec.image_mean),
            "std": list(spec.image_std),
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _named_state(model: EvaCLIP | VisionEncoder | Classifier) -> tuple[dict[str, torch.Tensor], str, str]:
    """Tensors under the published names, the kind of file, and its pooling."""
    if isinstance(model, EvaCLIP):
        return model.state_dict(), "clip", "cls"
    tower = dict(model.tower.state_dict())
    pool = "gap" if "fc_norm.weight" in tower else "cls"
    if isinstance(model, VisionEncoder):
        return tower, "vision", pool
    return tower | {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}, "classifier", pool


def _expanded(rules: list[Any], blocks: nn.Module) -> list[Any]:
    return expand(rules, len(blocks))  # type: ignore[arg-type]
